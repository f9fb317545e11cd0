"""The rows of one step: decode, verification and prefill are one path.

A step is R query rows of up to B sequences. Each row has a global position, and on each rank one integer,
``visible_len = local_len(position + 1, rank)``: the number of local tokens that it may attend to. That integer is the
whole causal mask on a sharded cache. Ranks differ in this data only, never in control flow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """What one rank needs to know of a step's rows. All tensors live on the rank's device.

    Rows of one sequence are neighbours and ascend in position. ``positions``, ``row_seq`` and ``query_start`` are equal
    on all ranks; ``visible_len``, ``slot`` and ``page_table`` are this rank's own, alike over TPA.

    Attributes:
        positions: [R] int64, global position of each row's token.
        row_seq: [R] int32, the page-table row of each row's sequence.
        visible_len: [R] int32, local tokens that the row sees, its own included where this rank owns it.
        slot: [R] int64, page * block_size + offset where the row's K and V go, or -1 where another rank owns them.
        page_table: [B, P] int32, local pages of each sequence in ascending position; unused entries are never read.
        query_start: [C + 1] int32, first row of each of the C runs of rows that share a sequence, then R.
        max_rows: the longest run, in rows.
        max_visible_len: a bound of ``visible_len`` over the rows of this step, in tokens.
    """

    positions: torch.Tensor
    row_seq: torch.Tensor
    visible_len: torch.Tensor
    slot: torch.Tensor
    page_table: torch.Tensor
    query_start: torch.Tensor
    max_rows: int
    max_visible_len: int

    @property
    def num_rows(self) -> int:
        """R."""
        return self.positions.shape[0]
