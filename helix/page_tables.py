"""Where this rank's pages of each sequence stand: a table on the host, and the same on the device, for attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from parallel.placement import BlockCyclic

from .batch import LocalRows, StepRows
from .cache.pool import BlockTable
from .mirror import Mirror
from .request import Chunk, Sequence
from .window_tables import WindowTables


@dataclass(frozen=True, slots=True)
class _Uploaded:
    """What the device knows of a sequence's pages: of so many pages, this rank's own."""

    blocks: BlockTable | None = None
    num_pages: int = 0
    num_local: int = 0


class PageTables:
    """The page tables of all batch slots.

    Args:
        placement: the rule of ownership.
        kvp_rank: this rank's.
        max_batch: batch slots.
        max_len: the longest sequence, in tokens.
        device: this rank's.
        window: tokens that rows of layers with a window see; 0 where the model has none.

    Attributes:
        device: [max_batch, P] int32, this rank's pages of each sequence in ascending position.
        host: the same, in NumPy.
        windows: the tables of the layers with a window; None where there are none.
    """

    def __init__(
        self,
        placement: BlockCyclic,
        kvp_rank: int,
        *,
        max_batch: int,
        max_len: int,
        device: torch.device,
        window: int = 0,
    ) -> None:
        self._placement, self._kvp_rank = placement, kvp_rank
        width = -(-placement.num_blocks(max_len) // placement.kvp)
        self._table = Mirror(max_batch, width, device)
        self.device, self.host = self._table.device, self._table.host
        self._uploaded: list[_Uploaded] = [_Uploaded()] * max_batch
        self.windows: WindowTables | None = None
        if window:
            self.windows = WindowTables(
                window, placement.block_size, max_batch=max_batch, max_len=max_len, device=device
            )

    @property
    def max_batch(self) -> int:
        """Batch slots."""
        return self.host.shape[0]

    @property
    def max_local_len(self) -> int:
        """Tokens of a sequence that this rank can hold."""
        return self.host.shape[1] * self._placement.block_size

    def update(self, chunks: Iterable[Chunk]) -> None:
        """Bring the tables of the chunks' sequences up to date: only pages that are not there yet travel."""
        if self.windows is not None:
            self.windows.update(chunks)
        self._table.write(self._news(chunk.seq) for chunk in chunks)

    def local_rows(self, rows: StepRows) -> LocalRows:
        """Return what this rank sees of a step's rows, whose sequences' tables are up to date."""
        local = LocalRows.of(rows, self._placement, self._kvp_rank, self.host)
        return local if self.windows is None else replace(local, window=self.windows.rows_of(rows))

    def _news(self, seq: Sequence) -> tuple[int, int, list[int]]:
        """Return the batch slot, first column and pages of what is new of a sequence's table; it counts as there."""
        slot, blocks = seq.batch_slot, seq.blocks
        known = self._uploaded[slot]
        start = known.num_local if known.blocks is blocks else 0
        if known.blocks is blocks and known.num_pages == len(blocks.pages):
            return slot, start, []
        new = blocks.local_pages(self._kvp_rank, self._placement.kvp, start=start)
        self._uploaded[slot] = _Uploaded(blocks, len(blocks.pages), start + len(new))
        return slot, start, new
