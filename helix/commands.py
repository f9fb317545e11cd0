"""What enters a running world: commands that rank 0 makes and every rank applies alike, between two steps.

A command holds nothing that can fail any more: ids, limits and seeds are settled. Decisions are never sent; every rank
takes them itself from the same commands in the same order.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from .cache.retention import Retention
from .request import RequestOutput, Sequence
from .sampling import SamplingParams


class _Named(msgspec.Struct, frozen=True):
    """A request.

    Attributes:
        index: names it from now on; no two that live at once share one.
        id: the caller's name for it, UTF-8 with lone surrogates.
    """

    index: int
    id: bytes | None

    @property
    def name(self) -> str | None:
        """The caller's name for it."""
        return None if self.id is None else self.id.decode("utf-8", "surrogatepass")


class Add(_Named, frozen=True, tag=True):
    """A request that can run.

    Attributes:
        token_ids: the prompt, little-endian int32.
        seed: of its random numbers.
        max_len: tokens, prompt included, at which it ends.
        bad_word_ids: the tokens of each of its bad words.
        grammar: of a structured request, on its way to rank 0, which keeps it: compiled, see helix/grammar. The first
            of several with the same brings it for all.
    """

    token_ids: bytes
    sampling: SamplingParams
    seed: int
    max_len: int
    cache_salt: str = ""
    retention: tuple[Retention, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    grammar: bytes = b""

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.token_ids) // 4

    @property
    def prompt(self) -> list[int]:
        """Its token ids."""
        ids: list[int] = np.frombuffer(self.token_ids, "<i4").tolist()
        return ids

    def sequence(self) -> Sequence:
        """Return the sequence that it stands for."""
        token_ids = self.prompt
        logprobs = None if self.sampling.logprobs is None else list[Any]()
        scores: list[Any] | None = None if self.sampling.prompt_logprobs is None else [None]
        return Sequence(
            index=self.index,
            token_ids=token_ids,
            prompt_len=len(token_ids),
            sampling=self.sampling,
            seed=self.seed,
            max_len=self.max_len,
            output=RequestOutput(self.name, prompt_tokens=len(token_ids), logprobs=logprobs, prompt_logprobs=scores),
            cache_salt=self.cache_salt,
            retention=self.retention,
            bad_word_ids=self.bad_word_ids,
            priority=self.priority,
        )


class Refuse(_Named, frozen=True, tag=True):
    """A request that cannot run, and why."""

    error: str


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request at once; nothing where it has ended."""

    index: int


class Cut(msgspec.Struct, frozen=True, tag=True):
    """A stop string was found in the last step's text: keep so many output tokens of the request, and end it.

    Attributes:
        stop: that string.
    """

    index: int
    num_tokens: int
    stop: str


class Close(msgspec.Struct, frozen=True, tag=True):
    """Nothing more will be added: end when everything has, or abort it now."""

    abort: bool = False


Command = Add | Refuse | Abort | Cut | Close
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Command)


def encode(command: Command) -> bytes:
    """Return a command's bytes.

    Raises:
        ValueError: where a field cannot travel: text that is none, an integer of more than 64 bits.
    """
    try:
        return _encoder.encode(command)
    except (OverflowError, UnicodeError) as error:
        raise ValueError(f"the request holds text that is none, or an integer beyond 64 bits: {error}") from error


def decode(data: bytes | msgspec.Raw) -> Command:
    """Return the command that some bytes hold; msgspec.ValidationError, a ValueError, where they hold none."""
    return _decoder.decode(data)
