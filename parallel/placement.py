"""Block-cyclic placement of one sequence's KV cache over the KVP ranks.

Ownership is a function of the global position, never a counter: block ``p // block_size`` lives on rank
``(p // block_size + first_owner) % kvp``. Prompt and decode obey the same rule, so decode blocks continue the prompt's
rotation, growth is round-robin, and every rank's length is a closed form that all ranks compute alike
(arXiv 2507.07120, section 2.3). Pure integers: nothing here imports torch or talks to another rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
IntOrArray = TypeVar("IntOrArray", int, IntArray)

MAX_BLOCK_SIZE = 256


@dataclass(frozen=True, slots=True)
class BlockCyclic:
    """The rule that maps global token positions to ranks and local slots.

    Every method takes Python integers or NumPy int64 arrays and returns the same kind; positions and lengths are in
    tokens. ``first_owner`` is the rank that holds block 0 of the sequence. The same object on every rank gives the
    same answers, for any rank.

    Raises:
        ValueError: when block_size is no power of two from 1 to 256, or kvp is not positive.
    """

    block_size: int
    kvp: int

    def __post_init__(self) -> None:
        size = self.block_size
        if not (1 <= size <= MAX_BLOCK_SIZE and size & (size - 1) == 0):
            raise ValueError(f"cache.block_size = {size} must be a power of two from 1 to {MAX_BLOCK_SIZE}")
        if self.kvp < 1:
            raise ValueError(f"parallel.kvp = {self.kvp} must be at least 1")

    def owner(self, position: IntOrArray, first_owner: IntOrArray | int = 0) -> IntOrArray:
        """Return the KVP rank that stores the token at a global position."""
        return (position // self.block_size + first_owner) % self.kvp

    def local_position(self, position: IntOrArray) -> IntOrArray:
        """Return where a position stands among the tokens that its owner holds of the sequence."""
        stride = self.block_size * self.kvp
        return position // stride * self.block_size + position % self.block_size

    def local_len(self, length: IntOrArray, rank: IntOrArray | int, first_owner: IntOrArray | int = 0) -> IntOrArray:
        """Return how many of the sequence's first ``length`` tokens a rank holds."""
        full, rest = length // (self.block_size * self.kvp), length % (self.block_size * self.kvp)
        turn = (rank - first_owner) % self.kvp
        tail = rest - turn * self.block_size
        if isinstance(tail, int):
            return full * self.block_size + min(max(tail, 0), self.block_size)
        local: IntArray = full * self.block_size + np.clip(tail, 0, self.block_size)
        return local

    def num_blocks(self, length: int) -> int:
        """Return the number of global blocks that ``length`` tokens touch."""
        return -(-length // self.block_size)

    def num_local_blocks(self, length: int, rank: int, first_owner: int = 0) -> int:
        """Return the number of blocks, whole or begun, that a rank holds of ``length`` tokens."""
        return -(-self.local_len(length, rank, first_owner) // self.block_size)
