"""What rank 0 and the HTTP process say to each other over a socket pair.

The HTTP process sends encoded commands (helix/commands.py) and nothing else. Rank 0 sends a ``Setup`` before its model
is loaded, a ``Ready`` when steps can run, then ``News``, and a ``Drain`` when the server is to end.
"""

from __future__ import annotations

import msgspec

from ..prompts import Limits
from ..sampling import SamplingParams
from .config import ServingConfig

BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 3600.0,
)  # fmt: skip
"""Bounds of the histograms' buckets, in seconds: a prompt of a million tokens may take an hour."""


class Setup(msgspec.Struct, frozen=True, tag=True):
    """What HTTP needs to begin: before it no answer is possible.

    Attributes:
        model_path: of the checkpoint, where the tokenizer is.
        served_name: the model's name for clients.
        key: what clients must send; None asks for none.
        version: of this program.
        sampling: settings of requests that do not say.
    """

    model_path: str
    served_name: str
    key: str | None
    version: str
    serving: ServingConfig
    sampling: SamplingParams


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Steps can run.

    Attributes:
        vocab_size: ids below it are tokens.
        limits: what one sequence can take.
        end_of_turn_ids: tokens that end the answer to messages.
        end_ids: tokens that end every answer.
    """

    vocab_size: int
    limits: Limits
    end_of_turn_ids: list[int]
    end_ids: list[int]

    @property
    def max_position(self) -> int:
        """Tokens that the model takes."""
        return self.limits.max_position


class TokenChance(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities at one position: the token's own, and the most likely ones' by id."""

    token_id: int
    logprob: float
    top: dict[int, float]


class End(msgspec.Struct, frozen=True, array_like=True):
    """How a request ended: finish_reason and stop_reason as ``RequestOutput`` has them."""

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    error: str | None
    stop_reason: int | str | None = None


class Delta(msgspec.Struct, array_like=True):
    """What is new of one request; ``prompt`` has the log-probabilities of its prompt, once, where they are wanted."""

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenChance] = []
    end: End | None = None
    prompt: list[TokenChance | None] = []


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """Durations at or below each bound of ``BOUNDS_S``, how many there are, and their sum in seconds."""

    counts: list[int]
    num: int
    total_s: float


class Stats(msgspec.Struct, frozen=True):
    """The world's counters since its start, and its state now.

    Attributes:
        trouble: what is wrong with another group that takes part.
        can_run: requests run all the same.
    """

    num_running: int
    num_waiting: int
    cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    queried_tokens: int
    hit_tokens: int
    preemptions: int
    steps: int
    ends: dict[str, int]
    ttft: Histogram
    inter_token: Histogram
    latency: Histogram
    queue: Histogram
    trouble: str = ""
    can_run: bool = True


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """How many tokens of a request's prompt are computed."""

    index: int
    num_computed: int
    prompt_len: int


class News(msgspec.Struct, frozen=True, tag=True):
    """What came of a turn; without anything it says that the world is alive."""

    deltas: list[Delta] = []
    progress: list[Progress] = []
    stats: Stats | None = None


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take no more requests, and close the door behind those that are there."""


Down = Setup | Ready | News | Drain
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Down)


def encode(message: Down) -> bytes:
    """Return a message's bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Down:
    """Return the message that some bytes hold."""
    return _decoder.decode(data)
