"""Where the pages of layers with a window stand, alike on all ranks: on the host, and for attention on the device."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .batch import StepRows, WindowRows
from .cache.windows import WindowTable
from .mirror import Mirror
from .request import Chunk, Sequence


class WindowTables:
    """The page tables of all batch slots, of the pages of layers with a window.

    Entries of pages that left the window stay as they were: no row sees them.

    Args:
        window: tokens that a row sees.
        block_size: tokens of a page.
        max_batch: batch slots.
        max_len: the longest sequence, in tokens.
        device: this rank's.

    Attributes:
        device: [max_batch, P] int32, the pages of each sequence by block.
    """

    def __init__(self, window: int, block_size: int, *, max_batch: int, max_len: int, device: torch.device) -> None:
        self.window, self._block_size = window, block_size
        self._table = Mirror(max_batch, -(-max_len // block_size), device)
        self.device = self._table.device
        self._uploaded: list[tuple[WindowTable | None, int]] = [(None, 0)] * max_batch  # up to which block

    def update(self, chunks: Iterable[Chunk]) -> None:
        """Bring the tables of the chunks' sequences up to date: only pages that are not there yet travel."""
        self._table.write(self._news(chunk.seq) for chunk in chunks)

    def rows_of(self, rows: StepRows) -> WindowRows:
        """Return what these layers see of a step's rows, whose sequences' tables are up to date.

        Tokens that were cached are not written anew, as elsewhere.
        """
        block, offset = np.divmod(rows.positions, self._block_size)
        slot = self._table.host[rows.row_seq, block].astype(np.int64) * self._block_size + offset
        slot[rows.positions < rows.reused] = -1
        return WindowRows.at(rows.positions + 1, self.window, slot)

    def _news(self, seq: Sequence) -> tuple[int, int, list[int]]:
        """Return the batch slot, first column and pages of what is new of a sequence's table; it counts as there."""
        slot, table = seq.batch_slot, seq.blocks.window
        whose, known = self._uploaded[slot]
        start = max(known if whose is table else 0, table.first)
        self._uploaded[slot] = table, table.stop
        return slot, start, table.pages[start - table.first :]
