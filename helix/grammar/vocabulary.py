"""A model's tokens as bytes: what grammars are compiled for, and matched over. It needs the extra ``grammar``."""

from __future__ import annotations

import codecs
import importlib.util
import json
import re
from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from ..request import MASK_BITS
from ..token_texts import TokenTexts

Mask = npt.NDArray[np.int32]
# Of UTF-8: second bytes that may follow a first one, where not all may. xgrammar lets others through in places.
_SECOND = {0xE0: range(0xA0, 0xC0), 0xED: range(0x80, 0xA0), 0xF0: range(0x90, 0xC0), 0xF4: range(0x80, 0x90)}
_CONTINUING = bytes(range(0x80, 0xC0))
_BLANKS = b" \n\r"
_BETWEEN = re.compile(rb" ?|\r|\r?\n {0,20}")  # the parts of JSON: a blank, or the end of a line and an indentation
_NOT_IN_JSON = frozenset(range(0x20)) - frozenset(_BLANKS)
_Decoder = codecs.getincrementaldecoder("utf-8")


class Vocabulary:
    """The bytes of every token of a tokenizer.

    A token that the tokenizer calls special spells nothing, nor does one that it does not have, or whose bytes are no
    part of a text: no grammar allows it.

    Args:
        tokenizer: the model's; None spells nothing.
        vocab_size: ids below it are tokens of the model.
        end_ids: tokens that end an output.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.vocab_size, self.end_ids = vocab_size, sorted(each for each in set(end_ids) if each < vocab_size)
        self._info: Any = None
        self._lock = Lock()
        self._between: dict[bytes, Mask] = {}

    @property
    def problem(self) -> str | None:
        """Why no answer can be structured, in one line; None where they can."""
        if importlib.util.find_spec("xgrammar") is None:
            return "sampling.structured_outputs needs xgrammar: pip install -c constraints.txt -e '.[grammar]'"
        if self._tokenizer is None:
            return "sampling.structured_outputs needs a tokenizer, but the model folder has none"
        if not self.end_ids:
            return "sampling.structured_outputs needs a token that ends an answer, but the model has none"
        return None

    def require(self) -> None:
        """Raise ValueError where no answer can be structured."""
        if (problem := self.problem) is not None:
            raise ValueError(problem)

    def prepare(self) -> None:
        """Make ``info`` before the first structured request, which would hold up others; nothing where none can."""
        if self.problem is None:
            _ = self.info

    def packed(self) -> bytes:
        """Return what a compiler's process makes ``info`` of: xgrammar imports torch, which this one may not have."""
        spelled = [each.decode("latin-1") for each in self._bytes]
        return json.dumps({"end_ids": self.end_ids, "spelled": spelled}).encode()

    @property
    def info(self) -> Any:
        """What xgrammar knows of it: equal wherever it is made of the same model. The first call takes a second.

        The masks are made with it, in the time of a thread that waits.
        """
        import xgrammar

        with self._lock:
            if self._info is None:
                _ = self._json_mask, self._beginnings, self._seconds
                self._info = xgrammar.TokenizerInfo(
                    self._bytes, xgrammar.VocabType.RAW, vocab_size=self.vocab_size, stop_token_ids=self.end_ids
                )
            return self._info

    def ends_with(self, stop_token_ids: Sequence[int]) -> list[int]:
        """Return the tokens that end an answer of these settings where it is whole: those of them that spell nothing.

        Any other that a request stops at may stop it in the middle.
        """
        silent = set(self.info.special_token_ids)
        return [*self.end_ids, *(each for each in stop_token_ids if each in silent and each not in self.end_ids)]

    def keep_json(self, mask: Mask, blanks: bytes) -> None:
        """Rule out what may not stand in JSON behind so many blanks, of what a grammar allows there.

        Between its parts, where the grammar allows the end of a line, that is more than one blank, or an end of a line
        with an indentation; not where nothing else may come, as in a text around a call.
        """
        mask &= self._json_mask
        if self._new_line is not None and allows(mask, self._new_line):
            bounded = mask & self._mask_between(blanks)
            if bounded.any():
                mask[:] = bounded

    def blanks_behind(self, token: int, blanks: bytes) -> bytes:
        """Return the blanks that a text ends with whose last token this is, with ``blanks`` in front of it."""
        spelled = self._bytes[token]
        bare = spelled.rstrip(_BLANKS)
        return spelled[len(bare) :] if bare else blanks + spelled

    def mask_after(self, token: int) -> Mask | None:
        """Return the tokens that may follow one that ends within a character, by UTF-8's rules; None for all."""
        spelled = self._bytes[token]
        return self._seconds.get(spelled[-1]) if spelled else None

    @cached_property
    def _json_mask(self) -> Mask:
        """The tokens that may stand in JSON: those without control characters, but for ends of lines.

        Tabs could stand between its parts; xgrammar lets all of them into strings of bounded length.
        """
        return _mask([_NOT_IN_JSON.isdisjoint(spelled) for spelled in self._bytes])

    def _mask_between(self, blanks: bytes) -> Mask:
        """Return the tokens that may follow such blanks between the parts of JSON."""
        blanks = blanks if _BETWEEN.fullmatch(blanks) else b" "  # nor may more stand behind those of one token
        if blanks not in self._between:
            may = [not begin or _BETWEEN.fullmatch(blanks + begin) is not None for begin in self._beginnings[0]]
            self._between[blanks] = _mask(np.array(may)[self._beginnings[1]])
        return self._between[blanks]

    @cached_property
    def _beginnings(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """The blanks that tokens begin with, each once, and which of them each token does."""
        blanks = [spelled[: len(spelled) - len(spelled.lstrip(_BLANKS))] for spelled in self._bytes]
        number = {each: at for at, each in enumerate(dict.fromkeys(blanks))}
        return list(number), np.array([number[each] for each in blanks])

    @cached_property
    def _new_line(self) -> int | None:
        """The token of the end of a line alone: JSON may have it between its parts and never in a string."""
        return self._bytes.index(b"\n") if b"\n" in self._bytes else None

    @cached_property
    def _seconds(self) -> dict[int, Mask]:
        return {
            first: _mask([not spelled or spelled[0] in seconds for spelled in self._bytes])
            for first, seconds in _SECOND.items()
        }

    @cached_property
    def _bytes(self) -> list[bytes]:
        texts = TokenTexts(self._tokenizer)
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        silent = {number for number, token in added.items() if token.special} | set(self.end_ids)
        known = len(self._tokenizer)
        spelled = (
            b"" if number in silent or number >= known else bytes(texts.spelled(number)[1])
            for number in range(self.vocab_size)
        )
        return [each if _is_text(each) else b"" for each in spelled]


def _is_text(spelled: bytes) -> bool:
    """Return whether bytes may be part of a text in UTF-8: its characters are whole but for the first and the last."""
    bare = spelled.lstrip(_CONTINUING)
    try:
        _Decoder().decode(bare)
    except UnicodeDecodeError:
        return False
    return len(spelled) - len(bare) < 4


def allows(mask: Mask, token: int) -> bool:
    """Return whether a mask allows a token."""
    return bool(mask[token // MASK_BITS] >> token % MASK_BITS & 1)


def _mask(allowed: Sequence[bool] | npt.NDArray[np.bool_]) -> Mask:
    """Return a mask of one bit a token."""
    bits = np.zeros(-(-len(allowed) // MASK_BITS) * MASK_BITS, np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view("<i4")
