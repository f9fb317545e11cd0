"""A model's tokens as bytes: what grammars are compiled for, and matched over. It needs the extra ``grammar``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from threading import Lock
from typing import Any

from ..token_texts import TokenTexts


class Vocabulary:
    """The bytes of every token of a tokenizer.

    A token that the tokenizer calls special spells nothing, as one that it does not have: no grammar allows it.

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

    def require(self) -> None:
        """Raise ValueError where no answer can be structured."""
        if importlib.util.find_spec("xgrammar") is None:
            raise ValueError(
                "sampling.structured_outputs needs xgrammar: pip install -c constraints.txt -e '.[grammar]'"
            )
        if self._tokenizer is None:
            raise ValueError("sampling.structured_outputs needs a tokenizer, but the model folder has none")
        if not self.end_ids:
            raise ValueError("sampling.structured_outputs needs a token that ends an answer, but the model has none")

    @property
    def info(self) -> Any:
        """What xgrammar knows of it: equal wherever it is made of the same model. The first call takes a second."""
        import xgrammar

        with self._lock:
            if self._info is None:
                self._info = xgrammar.TokenizerInfo(
                    self._spelled(), xgrammar.VocabType.RAW, vocab_size=self.vocab_size, stop_token_ids=self.end_ids
                )
            return self._info

    def ends_with(self, stop_token_ids: Sequence[int]) -> list[int]:
        """Return the tokens that end an answer of these settings where it is whole: those of them that spell nothing.

        Any other that a request stops at may stop it in the middle.
        """
        silent = set(self.info.special_token_ids)
        return [*self.end_ids, *(each for each in stop_token_ids if each in silent and each not in self.end_ids)]

    def _spelled(self) -> list[bytes]:
        texts = TokenTexts(self._tokenizer)
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        silent = {number for number, token in added.items() if token.special} | set(self.end_ids)
        known = len(self._tokenizer)
        return [
            b"" if number in silent or number >= known else bytes(texts.spelled(number)[1])
            for number in range(self.vocab_size)
        ]
