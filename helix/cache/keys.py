"""What a sequence's blocks are called in the prefix tree: the bytes of their tokens.

Keys are cut from one NumPy buffer, so a prompt costs no Python work a token, and they are cut once: a request that
waits and is matched again reuses them. Equal keys are equal tokens, on every rank; no decision depends on a hash.
"""

from __future__ import annotations

import numpy as np

TOKEN_BYTES = 4


def token_bytes(token_ids: list[int]) -> bytes:
    """Return token ids as little-endian int32, the form of every key."""
    return np.array(token_ids, dtype="<i4").tobytes()


class BlockKeys:
    """The keys of a growing list of tokens.

    Attributes:
        full: the keys of the whole blocks, ``block_size`` tokens each, as far as ``update`` has seen the list.

    Args:
        token_ids: the sequence's own list; it may grow, and what it holds may not change.
        block_size: tokens a block.
        salt: sequences share blocks only with those of the same salt.
    """

    __slots__ = ("block_size", "full", "salt", "token_ids")

    def __init__(self, token_ids: list[int], block_size: int, salt: str = "") -> None:
        self.token_ids, self.block_size, self.salt = token_ids, block_size, salt
        self.full: list[bytes] = []
        self.update()

    def update(self) -> None:
        """Cut the keys of the blocks that have filled up since."""
        size = self.block_size
        start, stop = len(self.full) * size, len(self.token_ids) // size * size
        if start < stop:
            data, step = token_bytes(self.token_ids[start:stop]), size * TOKEN_BYTES
            self.full += [data[at : at + step] for at in range(0, len(data), step)]

    def part(self, block: int, stop: int) -> bytes:
        """Return the key of a block's tokens at positions below ``stop``; empty where there are none."""
        start = block * self.block_size
        stop = min(stop, start + self.block_size)
        if block < len(self.full):
            return self.full[block][: max(stop - start, 0) * TOKEN_BYTES]
        return token_bytes(self.token_ids[start:stop])
