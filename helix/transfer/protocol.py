"""What the two groups say to each other: messages of fixed fields, checked when they are made and when they arrive.

On the wire a message is a msgpack map: its kind with the protocol's version, and its fields. Arrays are bytes: three
that name the dtype, then the little-endian elements, never pickle and never a list of numbers. Whatever comes from a
peer passes ``decode``; what it returns has every field, no other, each of its type and in its range, and arrays whose
lengths fit each other.

The prefill group's rank 0 is the one that tells first tokens; every other message is one rank's own:

 1. prefill -> decode  ``Hello``: who I am, and what we must agree on.
 2. decode -> prefill  ``Welcome``: where all our pools lie; or ``Refuse``: why not.
 3. prefill -> decode  ``Ready``: I can write to every pool that I have heads for.
 4. decode -> prefill  ``Ask``: prefill this, write its blocks there. ``Cancel``: stop that.
 5. prefill -> decode  ``Progress``, ``First`` (the token), and from every writer one ``End``.
 6. decode -> prefill  ``Bye``: nothing more will be asked.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from ..cache.retention import Retention
from ..request import Sequence, TokenLogprobs
from .facts import Process

VERSION = 5
MAX_MESSAGE_BYTES = 256 << 20
"""The longest message that is read: token ids and pages of 16 million tokens."""

State = Literal["done", "failed", "unknown"]
DONE: Final = "done"
FAILED: Final = "failed"
UNKNOWN: Final = "unknown"
RUNNING: Final = "running"
"""What a write is that has not ended; no end state."""

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
_DTYPES: dict[type, bytes] = {np.int32: b"<i4", np.int64: b"<i8"}


class MessageError(ValueError):
    """A message that does not keep the protocol."""


def require(holds: bool, what: str) -> None:
    """Raise MessageError that says ``what`` must hold, unless it does."""
    if not holds:
        raise MessageError(what)


class _Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag=lambda name: f"{name} {VERSION}"):
    """Fields that are checked when they arrive."""


class Hello(_Message, frozen=True):
    """A prefill rank introduces itself.

    Attributes:
        rank: in the prefill group.
        kvp, tpa: the group's layout.
        facts: what both groups must agree on, by setting.
        process: which one this is, so that its end can be told from its silence.
    """

    rank: Count
    kvp: Positive
    tpa: Positive
    facts: dict[str, Any]
    process: Process

    def __post_init__(self) -> None:
        require(self.rank < self.world_size, f"rank = {self.rank} of {self.kvp} x {self.tpa}")

    @property
    def world_size(self) -> int:
        """Ranks of the prefill group."""
        return self.kvp * self.tpa


class Pool(Struct, frozen=True, forbid_unknown_fields=True):
    """Where one rank's pages lie.

    Attributes:
        metadata: how the transport reaches the rank.
        layers: [L] the address of page 0 of each layer.
        page_bytes: from one page to the next.
        num_pages: pages of each layer.
        memory, device: the kind of memory, in the transport's words, and the device's number.
        machine: equal to a rank's own where that may map the pages; empty where none can.
        handle: what it maps them by.
    """

    metadata: bytes
    layers: Int64Array
    page_bytes: Positive
    num_pages: Positive
    memory: str
    device: Count
    machine: str = ""
    handle: bytes = b""

    def __post_init__(self) -> None:
        require(len(self.layers) > 0 and bool((self.layers > 0).all()), "layers must be addresses")


class Welcome(_Message, frozen=True):
    """The decode group's layout and the pools of all its ranks, in rank order.

    Attributes:
        pools: of pages, and of records of states or pages of windows where the model has either.
        lost: ranks of an earlier prefill group whose end is not known here.
    """

    kvp: Positive
    tpa: Positive
    pools: Annotated[list[list[Pool]], Meta(min_length=1)]
    lost: list[Process] = []

    def __post_init__(self) -> None:
        for pools in self.pools:
            require(len(pools) == self.kvp * self.tpa, f"{len(pools)} pools for {self.kvp} x {self.tpa} ranks")


class Refuse(_Message, frozen=True):
    """Why the groups cannot work together."""

    reason: str


class Ready(_Message, frozen=True):
    """The sender can write to the decode group's pools.

    Attributes:
        ended: those of ``Welcome.lost`` that have ended, as far as can be known on its machine.
    """

    ended: list[Process] = []


class Ask(_Message, frozen=True):
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
        record: where its states go, if the model has any.
        window_pages: the receiver's pages of its last blocks in layers with a window, if the model has any.
    """

    id: Count
    token_ids: Int32Array
    start: Count
    first_owner: Count
    pages: Int64Array
    sampling: dict[str, Any]
    seed: Count
    salt: str = ""
    retention: tuple[Retention, ...] = ()
    record: Count = 0
    window_pages: Int64Array = msgspec.field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        require(len(self.token_ids) > 0 and bool((self.token_ids >= 0).all()), "token_ids must be ids, and not empty")
        require(self.start < len(self.token_ids), f"start = {self.start} of {len(self.token_ids)} tokens")
        require(
            all(bool((pages >= 0).all()) for pages in (self.pages, self.window_pages)), "pages must not be negative"
        )

    @classmethod
    def of(cls, number: int, seq: Sequence, record: int = 0) -> Ask:
        """Return what asks for the prompt of a sequence that has its pages, and a record if its states go there."""
        sampling = asdict(seq.sampling) | {"structured_outputs": {}}  # the group that asks chooses by it
        return cls(
            id=number,
            token_ids=np.array(seq.token_ids, np.int32),
            start=seq.blocks.num_reused,
            first_owner=seq.blocks.first_owner,
            pages=np.array(seq.blocks.pages, np.int64),
            sampling=sampling,
            seed=seq.seed,
            salt=seq.cache_salt,
            retention=tuple(seq.retention),
            record=record,
            window_pages=np.array(seq.blocks.window.pages, np.int64),
        )

    def check_places(self, block_size: int, kvp: int, num_pages: int) -> None:
        """Raise MessageError unless pages fit the prompt and the receiver's pools."""
        num_blocks = -(-len(self.token_ids) // block_size)
        require(len(self.pages) == num_blocks, f"{len(self.pages)} pages for {num_blocks} blocks")
        require(bool((self.pages < num_pages).all()), f"page {int(self.pages.max())} of {num_pages}")
        require(self.first_owner < kvp, f"first_owner = {self.first_owner} of {kvp} KVP ranks")


class Cancel(_Message, frozen=True):
    """Stop a transfer; its writers still report how it ended."""

    id: Count


class Bye(_Message, frozen=True):
    """Nothing more will be asked."""


class Progress(_Message, frozen=True):
    """So many tokens of a prompt are computed; a sign of life while nothing else can be told."""

    id: Count
    num_tokens: Count


class First(_Message, frozen=True):
    """The first token of a prompt.

    Attributes:
        token: its id.
        seed: what it was drawn under.
        logprobs: None unless asked for.
    """

    id: Count
    token: Count
    seed: Count
    logprobs: TokenLogprobs | None = None


class End(_Message, frozen=True):
    """The end state of one writer.

    Attributes:
        state: done: all its bytes are there. failed: not all, and none of its writes is under way. unknown: a write
            may still land.
        reason: what happened, unless done.
    """

    id: Count
    state: State
    reason: str = ""


Message = Hello | Welcome | Refuse | Ready | Ask | Cancel | Bye | Progress | First | End


def pack_array(value: Any) -> bytes:
    """Return an array's bytes: an encoder's hook."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} cannot travel")
    return value.dtype.str.encode() + value.tobytes()


def unpack_array(wanted: Any, data: Any) -> npt.NDArray[Any]:
    """Return the array that bytes hold, of the dtype that is wanted: a decoder's hook."""
    _, of_elements = get_args(wanted)  # the alias itself is another object here, unequal from NumPy 2.5 on
    dtype = _DTYPES[get_args(of_elements)[0]]
    require(type(data) is bytes and data[:3] == dtype, f"an array of {dtype.decode()} begins with its dtype")
    return np.frombuffer(data, dtype.decode(), offset=3)


_encoder = msgspec.msgpack.Encoder(enc_hook=pack_array)
_decoder = msgspec.msgpack.Decoder(Message, dec_hook=unpack_array)


def encode(message: Message) -> bytes:
    """Return a message's bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Return the message that some bytes hold.

    Raises:
        MessageError: when they hold none: other bytes than msgpack, another version, an unknown kind, fields that are
            missing, too many, of another type or out of range.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise MessageError(str(error)) from error
