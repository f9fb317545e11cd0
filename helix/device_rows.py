"""Send the rows of a step that has no graph to the device: one copy, with the work of attention over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from attention.ranges import Filling, PlannedFillings
from attention.rows import Rows
from attention.work import Cutting, WorkList, cut
from parallel.placement import BlockCyclic, IntArray

from .batch import LocalRows, SharedRows, StepRows, WindowRows
from .cache.pages import PagedCache
from .models.decoder import Decoder
from .models.row_share import RowShare
from .models.wanted import Wanted
from .page_tables import PageTables
from .upload import WINDOW_PREFIX, arrays_of_work, sent_work, upload, window_rows


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """A step's rows on the device.

    Attributes:
        token_ids: [R] int64; -1 is the token that the device chose last for the row's batch slot.
        rows: their positions, lengths, slots and work.
        share: what each KVP rank projects of them; None where every rank projects all.
        fillings: what they attend to instead of the pages; none where they attend to the pages.
        beside: what was sent beside them.
    """

    token_ids: torch.Tensor
    rows: Rows
    share: RowShare | None
    fillings: list[Filling]
    beside: dict[str, torch.Tensor]


class RowSender:
    """Sends steps' rows to a decoder's device.

    Args:
        decoder: who computes them.
        tables: the sequences' pages.
        placement: the rule of ownership.
        share_rows: steps of at least so many rows share the QKV projection; 0 is never.
        expand_rows: steps with at least so many rows of one sequence attend to what is made in the decoder's
            workspace; 0 is never, as where it has none.
    """

    def __init__(
        self, decoder: Decoder, tables: PageTables, placement: BlockCyclic, *, share_rows: int, expand_rows: int
    ) -> None:
        self._decoder, self._tables, self._placement = decoder, tables, placement
        self._kvp_rank = decoder.grid.kvp_rank
        self._share_rows = share_rows if decoder.grid.layout.kvp > 1 else 0
        self._expand_rows = expand_rows

    def send(
        self,
        step: StepRows,
        local: LocalRows,
        cache: PagedCache,
        *,
        repeat: int = 1,
        beside: Mapping[str, npt.NDArray[np.generic]] | None = None,
        expands: bool | None = None,
    ) -> DeviceRows:
        """Send rows that attend to a cache, and what else there is to send ``beside`` them.

        ``repeat``: attend so often to each filling of a workspace, to take the memory of more than there are.
        ``expands``: whether they attend to fillings; None decides by the longest run.
        """
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "token_ids": step.token_ids,
            "positions": step.positions,
            "slot": local.slot,
            "row_seq": step.row_seq.astype(np.int32),
            "visible_len": local.visible.astype(np.int32),
            "query_start": step.query_start.astype(np.int32),
            **(beside or {}),
        }
        longest = int(step.counts.max())
        expands = 0 < self._expand_rows <= longest if expands is None else expands
        planned = self._plan(step, local, longest) if expands else None
        work = cutting = None
        if planned is not None:
            arrays |= planned.arrays
        elif cache.layers:
            cutting = self._decoder.cutting(cache.layers[0], max_rows=longest)
            work = None if cutting is None else cut(local.visible, step.query_start, step.row_seq, cutting)
        if work is not None:
            arrays |= arrays_of_work(work)
        of_window = None if local.window is None else self._cut_window(step, local.window, longest)
        if local.window is not None:
            arrays |= local.window.arrays
        if of_window is not None:
            arrays |= arrays_of_work(of_window[1], WINDOW_PREFIX)
        shares = 0 < self._share_rows <= step.num_rows  # alike on every rank
        shared = SharedRows.of(step, self._placement, self._kvp_rank) if shares else None
        if shared is not None:
            arrays |= {"mine": shared.mine, "order": shared.order}
        sent = upload(arrays, self._decoder.device)
        rows = Rows(
            positions=sent["positions"],
            row_seq=sent["row_seq"],
            visible_len=sent["visible_len"],
            slot=sent["slot"],
            page_table=self._tables.device,
            query_start=sent["query_start"],
            work=None if work is None or cutting is None else sent_work(cutting, work, sent),
        )
        if self._tables.windows is not None:
            window_work = None if of_window is None else sent_work(*of_window, sent, WINDOW_PREFIX)
            rows = replace(rows, window=window_rows(rows, sent, self._tables.windows.device, window_work))
        share = None if shared is None else RowShare(sent["mine"], shared.num_mine, sent["order"])
        fillings = [] if planned is None else planned.on_device(sent, rows) * repeat
        return DeviceRows(sent["token_ids"], rows, share, fillings, {name: sent[name] for name in beside or {}})

    def send_wanted(
        self, step: StepRows, local: LocalRows, cache: PagedCache, index: IntArray, *, expands: bool
    ) -> Wanted:
        """Send which rows of a step are wanted, and what attention needs of them alone; a row that sees nothing where
        none is: the last layer has collectives. ``expands``: the step attends to fillings.
        """
        some, seen = StepRows.for_nobody(1), LocalRows.for_nobody(1, window=self._decoder.spec.window)
        if len(index):
            some, seen = step.only(index), local.only(index)
        which = {"index": index if len(index) else np.zeros(1, np.int64)}
        sent = self.send(some, seen, cache, beside=which, expands=expands)
        return Wanted(sent.beside["index"], sent.rows, sent.fillings)

    def _cut_window(self, step: StepRows, seen: WindowRows, longest: int) -> tuple[Cutting, WorkList] | None:
        """Return the work of layers with a window; None where no work list is read."""
        cutting = self._decoder.window_cutting(max_rows=longest)
        if cutting is None:
            return None
        size = self._placement.block_size
        return cutting, cut(seen.visible_len, step.query_start, step.row_seq, cutting, seen.visible_from, size)

    def _plan(self, step: StepRows, local: LocalRows, longest: int) -> PlannedFillings:
        """Deal out what a step's rows see here into fillings of the decoder's workspace."""
        assert self._decoder.made is not None
        made = self._decoder.made
        cutting = self._decoder.cutting(made.workspace, max_rows=longest)
        return PlannedFillings.of(
            local.visible,
            step.query_start,
            step.row_seq,
            self._tables.host,
            block_size=self._placement.block_size,
            capacity=made.capacity,
            cutting=cutting,
        )
