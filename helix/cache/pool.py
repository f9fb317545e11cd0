"""The pages of all KVP ranks in one tier, and the pages of one sequence.

Every rank tracks the pages of *all* KVP ranks and takes the same decisions, so no message is needed. A page is
rank-local and holds one global block of one sequence; page ids are per KVP rank, and the same on all its TPA ranks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .keys import BlockKeys
from .retention import Retention
from .tree import Block
from .windows import WindowTable


@dataclass(slots=True)
class BlockTable:
    """The pages of one sequence: global block b is page ``pages[b]`` of rank ``(b + first_owner) % kvp``.

    Attributes:
        first_owner: the rank of block 0.
        pages: page ids; they are only ever added, until the table is released.
        num_reused: leading tokens whose K and V were in the cache when the sequence was admitted.
        num_matched: leading tokens whose blocks were in the tree then; it may have begun before their end, behind the
            last of them that has a checkpoint. 0 where sequences may begin anywhere.
        num_cached: leading blocks that are in the tree under these tokens.
        tail: the last of these blocks, or the root; pinned while the sequence runs.
        own: blocks below ``num_cached`` of which the sequence has a page of its own, because another sequence put the
            same tokens into the tree first.
        keeps: False when its blocks cannot enter the tree any more.
        beginning: its salt and first block, while it computes that; see ``Beginnings``.
        window: its pages in the pool of the layers with a window.
    """

    first_owner: int
    pages: list[int] = field(default_factory=list)
    num_reused: int = 0
    num_matched: int = 0
    num_cached: int = 0
    tail: Block | None = None
    keys: BlockKeys | None = None
    retention: tuple[Retention, ...] = ()
    own: list[int] = field(default_factory=list)
    keeps: bool = True
    beginning: tuple[str, bytes] | None = None
    window: WindowTable = field(default_factory=WindowTable)

    def local_pages(self, rank: int, kvp: int, start: int = 0) -> list[int]:
        """Return the page ids on a rank in ascending position, from the ``start``-th local one on."""
        return self.pages[(rank - self.first_owner) % kvp + start * kvp :: kvp]


class PagePool:
    """The free pages of one tier, for every KVP rank. Pages are taken in the order in which they became free.

    Args:
        num_ranks: KVP ranks.
        num_pages: pages of each rank.
    """

    def __init__(self, num_ranks: int, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = [deque(range(num_pages)) for _ in range(num_ranks)]

    def num_free(self, rank: int) -> int:
        """Return how many pages of a rank are free."""
        return len(self._free[rank])

    def take(self, rank: int) -> int:
        """Take the page of a rank that has been free longest; IndexError where none is."""
        return self._free[rank].popleft()

    def give(self, rank: int, page: int) -> None:
        """Give a page back."""
        self._free[rank].append(page)

    def remove(self, rank: int, page: int) -> None:
        """Take a certain page of a rank; ValueError where it is not free."""
        self._free[rank].remove(page)

    def free_pages(self, rank: int) -> list[int]:
        """Return the free pages of a rank, the next one first."""
        return list(self._free[rank])
