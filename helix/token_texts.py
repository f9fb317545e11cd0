"""The text and the bytes of single tokens, as log-probabilities show them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Spells the tokens of one tokenizer.

    Args:
        tokenizer: the model's; None has no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._letters = _letters() if _is_byte_level(tokenizer) else None
        self._special = set() if tokenizer is None else set(getattr(tokenizer, "added_tokens_decoder", {}))
        self.spelled = lru_cache(1 << 16)(self._spelled)

    def _spelled(self, token_id: int) -> tuple[str, list[int]]:
        """Return a token's text, with a replacement character for what is no character alone, and its bytes."""
        if self._tokenizer is None:
            return f"token_id:{token_id}", []
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return "", []
        if token_id in self._special:
            return piece, list(piece.encode())
        if self._letters is not None and all(letter in self._letters for letter in piece):
            data = bytes(self._letters[letter] for letter in piece)
        elif (byte := _BYTE.fullmatch(piece)) is not None:
            data = bytes([int(byte[1], 16)])
        else:
            data = piece.replace("\u2581", " ").encode()
        return data.decode("utf-8", "replace"), list(data)


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


def _letters() -> dict[str, int]:
    """Return the byte of each letter of byte-level BPE: printable ones are themselves, others lie from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 0x100 + others.index(byte)): byte for byte in range(256)}
