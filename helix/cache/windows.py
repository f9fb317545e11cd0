"""The second pool: pages of the layers that see a window, alike on all ranks, so one list of free ones serves them all.

A sequence holds the pages of its last tokens alone. It is given the pages of a step's rows before the step, and gives
back what has left the window after it, however long it grows:

    blocks        0 .. a        a+1 .. b              b+1 .. c
                  given back    seen by rows to come   written by the step's rows

There are pages for every sequence that may run and every row that a step may have (``pages_for``), so a running
sequence never lacks one and nobody is preempted for them. A page that is free is one that no launched step reads: it
left the window of every row that comes after those computed, and launched rows come after them.
"""

from __future__ import annotations

from collections import deque
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
    return max_batch * ((window + max_run) // block_size + 3) + 2 * prefill_chunk // block_size


class WindowPages:
    """The pages of all sequences.

    Args:
        window: tokens that a row sees, its own included.
        block_size: tokens of a page.
        num_pages: as ``pages_for`` says.
    """

    def __init__(self, window: int, block_size: int, num_pages: int) -> None:
        self._window, self._block_size = window, block_size
        self._free = deque(range(num_pages))

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def extend(self, table: WindowTable, stop: int) -> None:
        """Give a sequence the pages of its tokens before ``stop``; IndexError where none is free, which is a defect."""
        for _ in range(table.stop, -(-stop // self._block_size)):
            table.pages.append(self._free.popleft())

    def trim(self, table: WindowTable, num_computed: int) -> None:
        """Take back the pages that no row from position ``num_computed`` on sees."""
        gone = max(num_computed + 1 - self._window, 0) // self._block_size - table.first
        if gone > 0:
            self._free.extend(table.pages[:gone])
            del table.pages[:gone]
            table.first += gone

    def release(self, table: WindowTable) -> None:
        """Take back all pages of a sequence."""
        self._free.extend(table.pages)
        table.pages.clear()
