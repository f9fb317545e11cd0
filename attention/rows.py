"""The rows of one step: decode, verification and prefill are one path.

A step is R query rows of up to B sequences. Each row has a global position, and on each rank one integer,
``visible_len = local_len(position + 1, rank)``: the number of local tokens that it may attend to. That integer is the
whole causal mask on a sharded cache; a row of a layer with a window has a second one, the first token that it sees.
Ranks differ in this data only, never in control flow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .work import Cutting, cut


@dataclass(frozen=True)
class Work:
    """A work list on the device; see ``work.WorkList`` for its arrays, all int32.

    Attributes:
        cutting: what it was cut for: the kernel that it is made for, and no other, can run it.
        pieces: [N, 7], with room for more pieces than there may be.
        span_start: [programs + 1].
        part_start: [R + 1]; None where every row has exactly one partial.
        num_parts: partials that there is room for.
    """

    cutting: Cutting
    pieces: torch.Tensor
    span_start: torch.Tensor
    part_start: torch.Tensor | None
    num_parts: int

    @property
    def programs(self) -> int:
        """Programs of each KV head."""
        return self.span_start.shape[0] - 1


@dataclass(frozen=True)
class Rows:
    """What one rank needs to know of a step's rows. All tensors live on the rank's device.

    Rows of one sequence are neighbours and ascend in position. ``positions``, ``row_seq`` and ``query_start`` are equal
    on all ranks; ``visible_len``, ``slot``, ``page_table`` and ``work`` are this rank's own, alike over TPA.

    Attributes:
        positions: [R] int64, global position of each row's token.
        row_seq: [R] int32, the page-table row of each row's sequence.
        visible_len: [R] int32, local tokens that the row sees, its own included where this rank owns it.
        slot: [R] int64, page * block_size + offset where the row's K and V go, or -1 where another rank owns them.
        page_table: [B, P] int32, local pages of each sequence in ascending position; unused entries are never read.
        query_start: [C + 1] int32, first row of each of the C runs of rows that share a sequence, then R.
        work: who attends to what; None for a back end that asks for no work list.
        visible_from: [R] int32, the first local token that the row sees; None where every row sees all before it. Rows
            of a run ascend. Pages that no row sees are not read, whatever the page table says of them.
        window: the same rows as layers with a window see them; None where the model has none.
    """

    positions: torch.Tensor
    row_seq: torch.Tensor
    visible_len: torch.Tensor
    slot: torch.Tensor
    page_table: torch.Tensor
    query_start: torch.Tensor
    work: Work | None = None
    visible_from: torch.Tensor | None = None
    window: Rows | None = None

    @property
    def num_rows(self) -> int:
        """R."""
        return self.positions.shape[0]

    @property
    def seen_from(self) -> torch.Tensor:
        """``visible_from``, or an argument in its place for kernels that are told not to read it."""
        return self.visible_len if self.visible_from is None else self.visible_from

    def cut_for(self, cutting: Cutting | None, block_size: int) -> Rows:
        """Return these rows with the work list that a kernel asks for, made from lengths that are read back first."""
        if cutting is None:
            return replace(self, work=None)
        lengths, starts, seqs = (each.cpu().numpy() for each in (self.visible_len, self.query_start, self.row_seq))
        seen_from = None if self.visible_from is None else self.visible_from.cpu().numpy()
        work = cut(lengths, starts, seqs, cutting, seen_from, block_size)
        pieces, span_start, part_start = (
            torch.from_numpy(each).to(self.positions.device) for each in (work.pieces, work.span_start, work.part_start)
        )
        parts = part_start if work.is_split else None
        return replace(self, work=Work(cutting, pieces, span_start, parts, int(work.part_start[-1])))
