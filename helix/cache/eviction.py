"""Which block goes first: queues of what may go, ordered by priority and last use, and the times when priorities end.

Entries are not moved when a block changes: a stale entry is dropped when it comes up, so every operation costs the
logarithm of the queue. Ties end at the blocks' serial numbers, so all ranks choose alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from .retention import DEFAULT_PRIORITY
from .tree import Block, Entry

SLACK = 64  # stale entries that a queue may hold beyond twice its live ones before it is cleaned


class EvictionQueue:
    """The blocks of a tier that may go, of one rank or of all.

    Args:
        may_go: whether a block may go now; entries of others are dropped when they come up.
    """

    def __init__(self, may_go: Callable[[Block], bool]) -> None:
        self._may_go = may_go
        self._heap: list[Entry] = []
        self._num_pushed = 0  # tells entries of equal order apart
        self._limit = SLACK

    def push(self, block: Block) -> Entry:
        """Add a block under its present order; what it had in any queue is void. Return the entry."""
        self._num_pushed += 1
        entry = block.entry = (block.order, self._num_pushed, block)
        self.add(entry)
        return entry

    def add(self, entry: Entry) -> None:
        """Add what was pushed to another queue, too."""
        heapq.heappush(self._heap, entry)
        if len(self._heap) > self._limit:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + SLACK

    def peek(self) -> Block | None:
        """Return the block that goes first, or None."""
        while self._heap:
            if self._is_live(self._heap[0]):
                return self._heap[0][2]
            heapq.heappop(self._heap)
        return None

    def _is_live(self, entry: Entry) -> bool:
        block = entry[2]
        return block.entry is entry and entry[0] == block.order and self._may_go(block)


class Expiries:
    """The times at which priorities end."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Block]] = []
        self._num_pushed = 0
        self._limit = SLACK

    def push(self, block: Block) -> None:
        """Note that the block's priority ends at ``block.expires``, which has just changed."""
        assert block.expires is not None
        self._num_pushed += 1
        heapq.heappush(self._heap, (block.expires, self._num_pushed, block))
        if len(self._heap) > self._limit:  # blocks that were dropped, or whose end was moved
            self._heap = [entry for entry in self._heap if entry[0] == entry[2].expires]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + SLACK

    def pop_due(self, now: float) -> list[Block]:
        """Return the blocks whose priority has ended, and end it."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            expires, _, block = heapq.heappop(self._heap)
            if block.expires == expires:
                block.priority, block.expires = DEFAULT_PRIORITY, None
                due.append(block)
        return due
