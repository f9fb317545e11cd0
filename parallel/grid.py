"""The grid of ranks: one world seen as TPA x KVP by attention and as TPF x EP by the feed-forward network.

KVP is the innermost axis, so the ranks that exchange attention partials are neighbours: rank = tpa_rank * kvp +
kvp_rank. Projections see the flattened world. Ranges of heads and columns are contiguous and ascend with the rank, so
that what the exchange leaves on rank r is exactly what rank r's slice of the output projection multiplies
(arXiv 2507.07120, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist

from .layout import Layout


@dataclass(frozen=True)
class HelixGrid:
    """This rank's place in the layout, and the process groups it belongs to.

    ``kvp_group`` is None where KVP is 1 and ``world_group`` is None in a world of one: no collective is needed there.
    """

    layout: Layout
    rank: int
    kvp_group: dist.ProcessGroup | None
    world_group: dist.ProcessGroup | None

    @classmethod
    def create(cls, layout: Layout) -> HelixGrid:
        """Make the groups of the default process group's world.

        Collective: every rank calls it, with the same layout, before any other group is made.

        Raises:
            ValueError: when the world's size is not the layout's.
        """
        started = dist.get_world_size() if dist.is_initialized() else 1
        layout.check_world(started)
        if started == 1:
            return cls(layout, rank=0, kvp_group=None, world_group=None)
        rank, mine = dist.get_rank(), None
        if layout.kvp == layout.world_size:
            mine = dist.group.WORLD
        elif layout.kvp > 1:
            for tpa_rank in range(layout.tpa):
                first = tpa_rank * layout.kvp
                group = dist.new_group(list(range(first, first + layout.kvp)))
                if rank // layout.kvp == tpa_rank:
                    mine = group
        return cls(layout, rank=rank, kvp_group=mine, world_group=dist.group.WORLD)

    @property
    def world_size(self) -> int:
        """The number of ranks in the layout."""
        return self.layout.world_size

    @cached_property
    def kvp_rank(self) -> int:
        """This rank's index on the sequence axis."""
        return self.rank % self.layout.kvp

    @cached_property
    def tpa_rank(self) -> int:
        """This rank's index on the head axis."""
        return self.rank // self.layout.kvp
