"""Where the pages of layers with a window stand, alike on all ranks: on the host, and for attention on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .batch import StepRows, WindowRows
from .cache.windows import WindowTable
from .request import Chunk
from .upload import upload


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
        shape = max_batch, -(-max_len // block_size)
        self.device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._host: npt.NDArray[np.int32] = np.zeros(shape, np.int32)
        self._uploaded: list[tuple[WindowTable | None, int]] = [(None, 0)] * max_batch  # up to which block

    def update(self, chunks: Sequence[Chunk]) -> None:
        """Bring the tables of the chunks' sequences up to date: only pages that are not there yet travel."""
        slots: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for chunk in chunks:
            slot, table = chunk.seq.batch_slot, chunk.seq.blocks.window
            whose, known = self._uploaded[slot]
            start = max(known if whose is table else 0, table.first)
            if start < table.stop:
                slots += [slot] * (table.stop - start)
                columns += range(start, table.stop)
                pages += table.pages[start - table.first :]
            self._uploaded[slot] = table, table.stop
        if pages:
            self._host[slots, columns] = pages
            where = upload({"where": np.array([slots, columns, pages], np.int64)}, self.device.device)["where"]
            self.device[where[0], where[1]] = where[2].to(torch.int32)

    def rows_of(self, rows: StepRows) -> WindowRows:
        """Return what these layers see of a step's rows, whose sequences' tables are up to date."""
        block, offset = np.divmod(rows.positions, self._block_size)
        slot = self._host[rows.row_seq, block].astype(np.int64) * self._block_size + offset
        return WindowRows.at(rows.positions + 1, self.window, slot)
