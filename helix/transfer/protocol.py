"""What the two groups say to each other: messages of fixed fields, checked when they are made and when they arrive.

On the wire a message is msgpack: {"v": version, "kind": name, field: value, ...}. Arrays are extension type 1: three
bytes that name the dtype, then the raw little-endian elements, never pickle and never a Python list of numbers.
Whatever comes from a peer passes ``decode``; what it returns has every field, of its type, in its range, and arrays
whose lengths fit each other.

The prefill group's rank 0 is the one that tells first tokens; every other message is one rank's own:

 1. prefill -> decode  ``Hello``: who I am, and what we must agree on.
 2. decode -> prefill  ``Welcome``: where all our pools lie; or ``Refuse``: why not.
 3. prefill -> decode  ``Ready``: I can write to every pool that I have heads for.
 4. decode -> prefill  ``Ask``: prefill this, write its blocks there. ``Cancel``: stop that.
 5. prefill -> decode  ``Progress``, ``First`` (the token), and from every writer one ``End``.
 6. decode -> prefill  ``Bye``: nothing more will be asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from ..request import Sequence

VERSION = 1
MAX_MESSAGE_BYTES = 256 << 20
"""The longest message that is read: token ids and pages of 16 million tokens."""

DONE, FAILED, UNKNOWN = "done", "failed", "unknown"
END_STATES = (DONE, FAILED, UNKNOWN)
_ARRAY = 1
_DTYPES = ("<i4", "<i8", "<f8")

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class MessageError(ValueError):
    """A message that does not keep the protocol."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise MessageError(what)


@dataclass(frozen=True, slots=True)
class Hello:
    """A prefill rank introduces itself.

    Attributes:
        rank, world_size: in the prefill group.
        facts: what both groups must agree on, by setting.
        kvp, tpa: the group's layout.
        machine, pid, started: which process this is, so that its end can be told from its silence.
    """

    rank: int
    world_size: int
    facts: dict[str, Any]
    kvp: int
    tpa: int
    machine: str
    pid: int
    started: int

    def __post_init__(self) -> None:
        _require(self.kvp > 0 and self.tpa > 0, f"kvp = {self.kvp}, tpa = {self.tpa}")
        _require(self.world_size == self.kvp * self.tpa, f"world_size = {self.world_size} of {self.kvp} x {self.tpa}")
        _require(0 <= self.rank < self.world_size, f"rank = {self.rank} of {self.world_size}")


@dataclass(frozen=True, slots=True)
class Pool:
    """Where one rank's pages lie.

    Attributes:
        metadata: how the transport reaches the rank.
        layers: [L] the address of page 0 of each layer.
        page_bytes: from one page to the next.
        num_pages: pages of each layer.
        memory, device: the kind of memory, in the transport's words, and the device's number.
    """

    metadata: bytes
    layers: Int64Array
    page_bytes: int
    num_pages: int
    memory: str
    device: int

    def __post_init__(self) -> None:
        _require(self.page_bytes > 0 and self.num_pages > 0, f"{self.num_pages} pages of {self.page_bytes} bytes")
        _require(len(self.layers) > 0 and bool((self.layers > 0).all()), "layers must be addresses")


@dataclass(frozen=True, slots=True)
class Welcome:
    """The decode group's layout and the pools of all its ranks, in rank order."""

    kvp: int
    tpa: int
    pools: list[dict[str, Any]]

    def __post_init__(self) -> None:
        _require(self.kvp > 0 and self.tpa > 0, f"kvp = {self.kvp}, tpa = {self.tpa}")
        _require(len(self.pools) == self.kvp * self.tpa, f"{len(self.pools)} pools for {self.kvp} x {self.tpa} ranks")

    def parsed(self) -> list[Pool]:
        """Return the pools; MessageError where one is malformed."""
        return [_build(Pool, pool) for pool in self.pools]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Why the groups cannot work together."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The sender can write to the decode group's pools."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Prefill a prompt, sample its first token, and write the blocks of its positions from ``start`` on.

    Attributes:
        id: ascending; one that is not above all earlier ones is a duplicate.
        token_ids: [S] the prompt.
        start: positions below it are cached at the receiver and not sent.
        first_owner: the receiver's KVP rank of block 0.
        pages: [ceil(S / block_size)] the receiver's page of each block, on that block's owner.
        sampling: the settings of ``SamplingParams``.
        seed: of the request's random numbers.
        salt, retention: of its cached blocks.
    """

    id: int
    token_ids: Int32Array
    start: int
    first_owner: int
    pages: Int64Array
    sampling: dict[str, Any]
    seed: int
    salt: str = ""
    retention: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(len(self.token_ids) > 0 and bool((self.token_ids >= 0).all()), "token_ids must be ids, and not empty")
        _require(0 <= self.start < len(self.token_ids), f"start = {self.start} of {len(self.token_ids)} tokens")
        _require(self.first_owner >= 0 and self.id >= 0, f"first_owner = {self.first_owner}, id = {self.id}")
        _require(0 <= self.seed < 2**63, f"seed = {self.seed}")
        _require(bool((self.pages >= 0).all()), "pages must not be negative")

    @classmethod
    def of(cls, number: int, seq: Sequence) -> Ask:
        """Return what asks for the prompt of a sequence that has its pages."""
        sampling = asdict(seq.sampling) | {"structured_outputs": {}}  # the group that asks chooses by it
        sampling["logit_bias"] = {str(token): value for token, value in seq.sampling.logit_bias.items()}  # keys: texts
        return cls(
            id=number,
            token_ids=np.array(seq.token_ids, np.int32),
            start=seq.blocks.num_reused,
            first_owner=seq.blocks.first_owner,
            pages=np.array(seq.blocks.pages, np.int64),
            sampling=sampling,
            seed=seq.seed,
            salt=seq.cache_salt,
            retention=[asdict(each) for each in seq.retention],
        )

    def check_pages(self, block_size: int, kvp: int, num_pages: int) -> None:
        """Raise MessageError unless the pages fit the prompt and the receiver's pools."""
        num_blocks = -(-len(self.token_ids) // block_size)
        _require(len(self.pages) == num_blocks, f"{len(self.pages)} pages for {num_blocks} blocks")
        _require(bool((self.pages < num_pages).all()), f"page {int(self.pages.max())} of {num_pages}")
        _require(self.first_owner < kvp, f"first_owner = {self.first_owner} of {kvp} KVP ranks")


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a transfer; its writers still report how it ended."""

    id: int


@dataclass(frozen=True, slots=True)
class Bye:
    """Nothing more will be asked."""


@dataclass(frozen=True, slots=True)
class Progress:
    """So many tokens of a prompt are computed; a sign of life while nothing else can be told."""

    id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class First:
    """The first token of a prompt, and the state of its sampling.

    Attributes:
        token: its id.
        seed, num_drawn: the random numbers used so far are those of ``num_drawn`` tokens under ``seed``.
        logprob: its natural log-probability; None unless asked for.
        top_ids, top_logprobs: [n] the most likely tokens, n as asked for.
    """

    id: int
    token: int
    seed: int
    num_drawn: int
    logprob: float | None
    top_ids: Int64Array
    top_logprobs: Float64Array

    def __post_init__(self) -> None:
        _require(self.token >= 0, f"token = {self.token}")
        sizes = len(self.top_ids), len(self.top_logprobs)
        _require(sizes[0] == sizes[1], f"top_ids, top_logprobs = {sizes[0]}, {sizes[1]} entries")


@dataclass(frozen=True, slots=True)
class End:
    """The end state of one writer.

    Attributes:
        state: done: all its bytes are there. failed: not all, and none of its writes is under way. unknown: a write
            may still land.
        reason: what happened, unless done.
    """

    id: int
    state: str
    reason: str = ""

    def __post_init__(self) -> None:
        _require(self.state in END_STATES, f"state = {self.state!r}")


Message = Hello | Welcome | Refuse | Ready | Ask | Cancel | Bye | Progress | First | End
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Hello, Welcome, Refuse, Ready, Ask, Cancel, Bye, Progress, First, End)
}


def _is_array(dtype: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, np.ndarray) and value.dtype == np.dtype(dtype) and value.ndim == 1


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int and -(2**63) <= value < 2**63,
    "float | None": lambda value: value is None or type(value) is float,
    "str": lambda value: type(value) is str,
    "bytes": lambda value: type(value) is bytes,
    "dict[str, Any]": lambda value: type(value) is dict and all(type(key) is str for key in value),
    "list[dict[str, Any]]": lambda value: type(value) is list and all(type(each) is dict for each in value),
    "Int32Array": _is_array("<i4"),
    "Int64Array": _is_array("<i8"),
    "Float64Array": _is_array("<f8"),
}


def encode(message: Message) -> bytes:
    """Return a message's bytes."""
    body = {each.name: getattr(message, each.name) for each in fields(message)}
    packed: bytes = msgpack.packb({"v": VERSION, "kind": type(message).__name__, **body}, default=_pack_array)
    return packed


def decode(data: bytes) -> Message:
    """Return the message that some bytes hold.

    Raises:
        MessageError: when they hold none: other bytes than msgpack, another version, an unknown kind, fields that are
            missing, too many, of another type or out of range.
    """
    try:
        body = msgpack.unpackb(data, ext_hook=_unpack_array, strict_map_key=True)
    except MessageError:
        raise
    except Exception as error:  # msgpack raises many kinds, and unpacking must not end the rank
        raise MessageError(f"no msgpack: {error!r}") from error
    if not isinstance(body, dict) or body.pop("v", None) != VERSION:
        raise MessageError(f"no message of version {VERSION}")
    kind = body.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise MessageError(f"kind = {kind!r}")
    message: Message = _build(_KINDS[kind], body)
    return message


def pool_dict(pool: Pool) -> dict[str, Any]:
    """Return a pool as it travels in ``Welcome``."""
    return asdict(pool)


def _build(kind: type[Any], body: Any) -> Any:
    names = [each.name for each in fields(kind)]
    if not isinstance(body, dict) or set(body) != set(names):
        raise MessageError(f"{kind.__name__} has the fields {', '.join(names)}")
    for each in fields(kind):
        assert isinstance(each.type, str)
        if not _CHECKS[each.type](body[each.name]):
            raise MessageError(f"{kind.__name__}.{each.name} must be of type {each.type}")
    return kind(**body)


def _pack_array(value: Any) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray) or value.dtype.str not in _DTYPES or value.ndim != 1:
        raise TypeError(f"{type(value).__name__} cannot travel")
    return msgpack.ExtType(_ARRAY, value.dtype.str.encode() + value.tobytes())


def _unpack_array(code: int, data: bytes) -> npt.NDArray[Any]:
    dtype = bytes(data[:3]).decode("ascii", "replace")
    if code != _ARRAY or dtype not in _DTYPES or (len(data) - 3) % np.dtype(dtype).itemsize:
        raise MessageError(f"extension {code} of {len(data)} bytes is no array")
    return np.frombuffer(data, dtype, offset=3)
