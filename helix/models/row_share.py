"""Steps of many rows share the QKV projection: who projects which, and where the rows are afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.collectives import all_gather


@dataclass(frozen=True)
class RowShare:
    """Which rows this KVP rank projects, and how gathered rows return to their order.

    Attributes:
        mine: [M] int64, the rows whose positions this rank owns, then padding (row 0); M is equal on all KVP ranks.
        num_mine: how many of them are real.
        order: [R] int64, where each row stands in the gathered [KVP * M].
    """

    mine: torch.Tensor
    num_mine: int
    order: torch.Tensor

    def own(self, slot: torch.Tensor) -> torch.Tensor:
        """Return the slots [M] of the rows that this rank projects, of those of all rows [R]: padding has none."""
        own = slot[self.mine]
        own[self.num_mine :] = -1
        return own

    def gather(self, mine: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Return what the KVP ranks made of their rows, [M, ...] each, for all rows: [R, ...]; collective over them."""
        return all_gather(mine, group).flatten(0, 1)[self.order]
