"""The second pool: pages of the layers that see a window, alike on all ranks, so one list of free ones serves them all.

A sequence holds the pages of its last tokens alone. It is given the pages of a step's rows before the step, and gives
back what has left the window after it, however long it grows:

    blocks        0 .. a        a+1 .. b              b+1 .. c
                  given back    seen by rows to come   written by the step's rows

There are pages for every sequence that may run and every row that a step may have (``pages_for``), so a running
sequence never lacks one and nobody is preempted for them. A page that is free is one that no launched step reads: it
left the window of every row that comes after those computed, and launched rows come after them.

Where prefixes are reused, checkpoints hold on to pages as well: whoever begins behind a block needs the pages of the
window before it. Nothing is copied: what is before a position is never written again, so sequences and checkpoints
share pages. A checkpoint gives up its pages when a sequence needs some, the least recently used first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class WindowTable:
    """The pages of one sequence: block ``first + i`` is page ``pages[i]``; earlier blocks have none."""

    first: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """The block after the last one that has a page."""
        return self.first + len(self.pages)


def pages_for(window: int, block_size: int, *, max_batch: int, max_run: int, prefill_chunk: int) -> int:
    """Return how many pages all sequences may hold together.

    Each holds the blocks of its window and of the rows of two steps: one may be launched before the other is read.

    Args:
        window: tokens that a row sees.
        block_size: tokens of a page.
        max_batch: sequences.
        max_run: rows of a sequence that decodes, in two steps, or verifies, which is never launched ahead.
        prefill_chunk: rows of prompts in a step, over all sequences.
    """
    return max_batch * ((window + max_run) // block_size + 4) + 2 * prefill_chunk // block_size


def pool_pages(
    window: int, block_size: int, *, max_batch: int, max_run: int, prefill_chunk: int, max_len: int, twice: bool
) -> int:
    """Return how many pages the pool has: what sequences of at most ``max_len`` tokens may hold together.

    The other sizes are those of ``pages_for``. ``twice``: as many again, for checkpoints where prefixes are reused, and
    for pages that a lost prefill rank may still write where transfers are on.
    """
    held = pages_for(window, block_size, max_batch=max_batch, max_run=max_run, prefill_chunk=prefill_chunk)
    held = min(held, max_batch * -(-max_len // block_size))
    return 2 * held if twice else held


class WindowPages:
    """The pages of all sequences and checkpoints.

    Args:
        window: tokens that a row sees, its own included.
        block_size: tokens of a page.
        num_pages: at least as ``pages_for`` says.

    Attributes:
        give_up: called where no page is free; frees some, or returns False.
    """

    def __init__(self, window: int, block_size: int, num_pages: int) -> None:
        self._window, self._block_size = window, block_size
        self._free = deque(range(num_pages))
        self._holders = [0] * num_pages
        self.give_up: Callable[[], bool] = _nothing_to_give

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def extend(self, table: WindowTable, stop: int) -> None:
        """Give a sequence the pages of its tokens before ``stop``; IndexError where none is free, which is a defect."""
        for _ in range(table.stop, -(-stop // self._block_size)):
            while not self._free and self.give_up():
                pass
            page = self._free.popleft()
            self._holders[page] = 1
            table.pages.append(page)

    def trim(self, table: WindowTable, num_computed: int) -> None:
        """Take back the pages that no row sees from the last block on that begins at or before ``num_computed``."""
        gone = self._first_of(num_computed) - table.first
        if gone > 0:
            self.drop(table.pages[:gone])
            del table.pages[:gone]
            table.first += gone

    def release(self, table: WindowTable) -> None:
        """Take back all pages of a sequence."""
        self.drop(self.detach(table))

    def detach(self, table: WindowTable) -> list[int]:
        """Take a sequence's pages out of its table; they are held until they are dropped."""
        pages, table.pages = table.pages, []
        return pages

    def first_of_arrival(self, length: int) -> int:
        """Return the first block that a sequence needs whose ``length`` tokens were computed elsewhere.

        Its last row may be computed again.
        """
        return self._first_of(length - 1)

    def arrive(self, table: WindowTable, length: int) -> None:
        """Give an empty table the pages of such a sequence."""
        table.first = self.first_of_arrival(length)
        self.extend(table, length)

    def has_before(self, table: WindowTable, position: int) -> bool:
        """Return whether a sequence still has all pages that ``before`` returns of a position that is computed."""
        return table.first <= self._first_of(position)

    def before(self, table: WindowTable, position: int) -> list[int]:
        """Return the pages of a sequence that rows from ``position`` on see, a multiple of the block size; not trimmed
        beyond it.
        """
        first, stop = self._first_of(position), position // self._block_size
        assert table.first <= first and stop <= table.stop
        return table.pages[first - table.first : stop - table.first]

    def share(self, pages: list[int]) -> None:
        """Hold pages that are held once more."""
        for page in pages:
            self._holders[page] += 1

    def drop(self, pages: list[int]) -> None:
        """Let go of pages, which are free when nobody holds them."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def begin(self, table: WindowTable, position: int, pages: list[int]) -> None:
        """Give an empty table the pages that its rows see from ``position`` on, a multiple of the block size."""
        self.share(pages)
        table.first, table.pages = position // self._block_size - len(pages), list(pages)

    def _first_of(self, position: int) -> int:
        """Return the first block that rows see from the last block on that begins at or before a position."""
        begin = position // self._block_size * self._block_size
        return max(begin + 1 - self._window, 0) // self._block_size


def _nothing_to_give() -> bool:
    return False
