"""The control plane of the cache: which pages of which KVP rank belong to which sequence.

Every rank runs the same code on the same inputs, tracks the pools of *all* KVP ranks and so takes the same decisions;
no message is needed. A page is rank-local and holds one global block of one sequence; page ids are per KVP rank, and
the same on all its TPA ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from parallel.placement import BlockCyclic


@dataclass(slots=True)
class BlockTable:
    """The pages of one sequence: global block b is page ``pages[b]`` of rank ``(b + first_owner) % kvp``."""

    first_owner: int
    pages: list[int] = field(default_factory=list)

    def local_pages(self, rank: int, kvp: int, start: int = 0) -> list[int]:
        """Return the page ids on a rank in ascending position, from the ``start``-th local one on."""
        return self.pages[(rank - self.first_owner) % kvp + start * kvp :: kvp]


class PagePools:
    """The free pages of every KVP rank.

    Args:
        placement: the rule of ownership.
        num_pages: pages of each rank.
    """

    def __init__(self, placement: BlockCyclic, num_pages: int) -> None:
        self.placement = placement
        self.num_pages = num_pages
        self._free = [list(range(num_pages - 1, -1, -1)) for _ in range(placement.kvp)]

    def num_free(self, rank: int) -> int:
        """Return how many pages of a rank are free."""
        return len(self._free[rank])

    def fits(self, length: int) -> bool:
        """Return whether empty pools can hold a sequence of so many tokens."""
        return -(-self.placement.num_blocks(length) // self.placement.kvp) <= self.num_pages

    def new_table(self) -> BlockTable:
        """Return an empty table whose block 0 goes to the rank with the most free pages, the lowest of equals."""
        free = [len(pages) for pages in self._free]
        return BlockTable(first_owner=free.index(max(free)))

    def grow(self, table: BlockTable, length: int) -> bool:
        """Give a table the pages that ``length`` tokens need; take none and return False where they are not free."""
        kvp = self.placement.kvp
        owners = [
            (block + table.first_owner) % kvp for block in range(len(table.pages), self.placement.num_blocks(length))
        ]
        if any(owners.count(rank) > len(self._free[rank]) for rank in set(owners)):
            return False
        table.pages.extend(self._free[owner].pop() for owner in owners)
        return True

    def release(self, table: BlockTable) -> None:
        """Take back all pages of a table and empty it."""
        for block, page in enumerate(table.pages):
            self._free[(block + table.first_owner) % self.placement.kvp].append(page)
        table.pages.clear()
