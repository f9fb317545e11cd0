"""The nouns that the runtime shares: requests, sequences, chunks, outputs. Nothing here computes or communicates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .cache.checkpoints import Kept
from .cache.keys import BlockKeys
from .cache.pool import BlockTable
from .cache.retention import Retention
from .checks import check_text, plain_number, whole_number
from .fair_share import Order

if TYPE_CHECKING:
    from .sampling import SamplingParams

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"
"""Why a request ended: its own end or a stop of its settings, its length, its caller, a failure."""

MAX_SALT_CHARS = 1_000
MASK_BITS = 32  # tokens that a word of a mask tells of
MAX_URGENCY = 100


@dataclass(slots=True)
class Request:
    """One prompt: exactly one of text, token ids and chat messages. Rank 0's counts.

    Attributes:
        prompt: text; token ids are the tokenizer's, special tokens included.
        prompt_token_ids: token ids, used as they are.
        messages: chat turns {"role", "content"}, put through the tokenizer's chat template.
        template: arguments of the chat template, such as tools; only with messages.
        is_rendered: the prompt is a chat template's text: special tokens are in it, and an end of turn ends the answer.
        sampling: how to sample; None takes the run's own.
        id: the caller's name for it, returned with the output.
        cache_salt: it shares cached blocks only with requests of the same salt.
        retention: how long ranges of its tokens stay cached; the last that covers a block's first token decides.
        priority: its class, from -100 to 100; higher ones begin first and are preempted last, see ``Scheduler``.
        error: why the request cannot run; it then fails alone, with this message.
    """

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    template: dict[str, Any] = field(default_factory=dict)
    is_rendered: bool = False
    sampling: SamplingParams | None = None
    id: str | None = None
    cache_salt: str = ""
    retention: tuple[Retention, ...] = ()
    priority: int = 0
    error: str | None = None

    def check(self) -> None:
        """Raise ValueError, in one line, where it is none that can run, whatever the model: see the attributes.

        Ids and priority of other types than Python's, such as NumPy's, become its own.
        """
        if self.error is not None:
            raise ValueError(self.error)
        given = [name for name in ("prompt", "prompt_token_ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a request takes one of prompt, prompt_token_ids and messages, not {given or 'none'}")
        ids: Any = self.prompt_token_ids
        self.prompt_token_ids = ids.tolist() if hasattr(ids, "tolist") else ids
        for name, kind in (("prompt", str), ("prompt_token_ids", list), ("messages", list), ("cache_salt", str)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} is a {type(value).__name__}, must be a {kind.__name__}")
        if self.prompt_token_ids is not None and not all(type(token) is int for token in self.prompt_token_ids):
            self.prompt_token_ids = [plain_number(token) for token in self.prompt_token_ids]
            if not all(type(token) is int for token in self.prompt_token_ids):
                raise ValueError("prompt_token_ids must be integers")
        if not all(isinstance(each, Retention) for each in self.retention):
            raise ValueError("retention must hold Retention objects alone")
        self.priority = priority_of(self.priority)
        if len(self.cache_salt) > MAX_SALT_CHARS:
            raise ValueError(f"cache_salt has {len(self.cache_salt)} characters, must have at most {MAX_SALT_CHARS}")
        if self.template and self.messages is None:
            raise ValueError(f"{next(iter(self.template))} is for the chat template; it needs messages")
        for name in ("prompt", "messages", "template", "cache_salt"):
            check_text(name, getattr(self, name))


def priority_of(given: Any) -> int:
    """Return the priority that a value stands for; ValueError, in one line, where it is none."""
    value = whole_number(given)
    if type(value) is not int or abs(value) > MAX_URGENCY:
        raise ValueError(f"priority = {given!r} must be an integer in {-MAX_URGENCY}..{MAX_URGENCY}")
    return value


@dataclass(slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position: of the token that is there, and of the most likely ones by id."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(slots=True)
class RequestOutput:
    """What became of one request; equal on every rank, but for the text, which is rank 0's alone.

    Attributes:
        id: the request's.
        token_ids: the tokens made, the one that stopped it included.
        text: their text, up to a stop string and without special tokens, unless the settings ask for them.
        finish_reason: stop, length, abort or error.
        stop_reason: the stop string or the id in stop_token_ids that ended it; None where something else did.
        prompt_tokens: length of the prompt, in tokens.
        cached_tokens: prompt tokens whose KV was found in the cache, not computed.
        logprobs: one entry a token, when asked for.
        prompt_logprobs: one entry a token of the prompt, when asked for; the first has none.
        error: what failed, for finish_reason error.
    """

    id: str | None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    stop_reason: int | str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None


@dataclass(slots=True)
class StreamEvent:
    """New tokens of one request, and on rank 0 their text; ``output`` is set on its last event."""

    index: int
    token_ids: list[int]
    text: str
    output: RequestOutput | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request that runs.

    Attributes:
        index: the request's place in its batch of requests.
        token_ids: prompt, then output; ``prompt_len`` tells where the output begins.
        seed: of its random numbers, 64 bits.
        max_len: tokens, prompt included, at which it ends for length.
        num_computed: tokens whose K and V are in the cache.
        batch_slot: its row of the page table while it runs, else -1.
        cache_salt, retention, priority: the request's.
        order: its place in line, set when it arrives.
        num_missing: tokens that it did not find cached when it last looked; None before.
        waits_for: who computes blocks that it shares, and how many tokens of these; None where it waits for nobody.
        keys: its blocks' keys, made when it is first matched.
        was_admitted: True from its first admission on; later ones resume it.
        keeps_pages: it keeps its pages when it ends, until whoever reads them releases them.
        keeps_slot: and its batch slot: what state layers have there, and one that ended counts where windows are given.
        arrived_s, last_token_s: when it came, and its last token, by this rank's own clock: for the metrics alone.
        bad_word_ids: the tokens of each of the bad words.
        logit_bias: token ids and what is added to their logits, as arrays; None where nothing is.
        distinct_prompt_ids: sorted ids of the prompt where a repetition penalty needs them, else None.
    """

    index: int
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    seed: int
    max_len: int
    output: RequestOutput
    blocks: BlockTable = field(default_factory=lambda: BlockTable(0))
    num_computed: int = 0
    batch_slot: int = -1
    cache_salt: str = ""
    retention: tuple[Retention, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    order: Order | None = None
    num_missing: int | None = None
    waits_for: tuple[Sequence, int] | None = None
    keys: BlockKeys | None = None
    was_admitted: bool = False
    keeps_pages: bool = False
    keeps_slot: bool = False
    arrived_s: float = 0.0
    last_token_s: float | None = None
    logit_bias: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None
    distinct_prompt_ids: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        bias = self.sampling.logit_bias
        if bias:
            self.logit_bias = np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)
        if self.sampling.repetition_penalty != 1.0:
            self.distinct_prompt_ids = np.unique(np.array(self.token_ids[: self.prompt_len], np.int64))

    @property
    def output_ids(self) -> list[int]:
        """The tokens made so far."""
        return self.token_ids[self.prompt_len :]

    @property
    def num_todo(self) -> int:
        """Known tokens that are not computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_scored(self) -> int:
        """Leading tokens of the prompt whose log-probabilities are there, or not wanted."""
        found = self.output.prompt_logprobs
        return self.prompt_len if found is None else len(found)

    @property
    def scores_prompt(self) -> bool:
        """True while log-probabilities of its prompt are wanted that are not there yet."""
        return self.num_scored < self.prompt_len

    @property
    def most_reused(self) -> int:
        """Tokens whose keys and values may be another's: none whose row says how likely the prompt's next token is."""
        return (self.num_scored if self.scores_prompt else len(self.token_ids)) - 1

    @property
    def is_new(self) -> bool:
        """True before it was admitted first."""
        return self.batch_slot < 0 and not (self.was_admitted or self.has_ended)

    @property
    def is_structured(self) -> bool:
        """True where rank 0 says which tokens may come next, once it knows those before."""
        return bool(self.sampling.structured_outputs)

    @property
    def has_ended(self) -> bool:
        """True once a token was its last."""
        return bool(self.output.finish_reason)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, stop) of a sequence, computed in one step, and the drafts that are computed with them.

    A decode row may be launched before its token is known; the token is then the one that the device chose last for the
    sequence's batch slot.

    Attributes:
        drafts: tokens that may come next, at positions [stop, stop + len(drafts)); only of a chunk that samples. Those
            that the device alone knows yet are -2 and below.
        masks: of a structured sequence's rows that choose, which tokens each may choose: int32 [num_choices, W], bit t
            of a row is token t.
        kept: what is kept of it for later prompts, and where; None where these may begin anywhere.
    """

    seq: Sequence
    start: int
    stop: int
    drafts: tuple[int, ...] = ()
    masks: npt.NDArray[np.int32] | None = field(default=None, compare=False)
    kept: Kept | None = None

    @property
    def samples(self) -> bool:
        """True when the chunk reaches the end, so that its last row's logits choose the next token."""
        return self.stop >= len(self.seq.token_ids)

    @property
    def is_decode(self) -> bool:
        """True for one token that chooses the next."""
        return self.stop - self.start == 1 and self.samples

    @property
    def num_rows(self) -> int:
        """Rows that are computed."""
        return self.stop - self.start + len(self.drafts)

    @property
    def num_choices(self) -> int:
        """How many of the last rows choose a token: that of the last known token, and one a draft."""
        return 1 + len(self.drafts) if self.samples else 0


def order_of(seq: Sequence) -> Order:
    """Return the place in line of a sequence that has one."""
    assert seq.order is not None
    return seq.order
