"""One rank of a layout without the others: it computes what that rank would, on its slices, and nobody answers it.

For measurements of what a rank of many does, on one GPU. Collectives are left out: what others would add or send is
missing, so tokens mean nothing. What is left of them is this rank's own work: the merge of its partials, the residual
and the norm, the best of its slice of the vocabulary. Rows of long steps are not shared: it projects all of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod

import torch

from attention.exchange import Exchange, Heads
from attention.merge import join_sinks, merge_parts
from attention.partial import Partials
from parallel.grid import HelixGrid
from parallel.launch import Launch
from parallel.layout import split_evenly

from .building import Builder
from .config import HelixConfig
from .llm import LLM, enter
from .models.query_share import rows_to_split
from .prepare import Prepared

LEFT_OUT = "all-to-all of partials, all-reduces, gather of queries, choice among ranks"


class LoneRank(LLM):
    """An ``LLM`` of one process that stands in for one rank of a layout.

    Args:
        config: the settings of the run; its layout has ``of`` ranks.
        rank: which of them this one is.
        of: how many there would be.

    Raises:
        ValueError: as ``LLM`` does, and when more than one process was started, or ``rank`` is none of ``of``.
    """

    def __init__(self, config: HelixConfig, *, rank: int, of: int) -> None:
        if not 0 <= rank < of:
            raise ValueError(f"rank = {rank} must be one of the ranks of = {of}: 0 to {of - 1}")
        self._place = rank, of
        super().__init__(replace(config, attention=replace(config.attention, share_qkv_rows=0)))

    def _enter(self, config: HelixConfig) -> Launch:
        launch, (rank, of) = enter(config), self._place
        if launch.world_size > 1:
            raise ValueError(f"of = {of} is for one process that stands in for a rank, but {launch.world_size} started")
        return _Alone(**asdict(launch) | {"rank": rank, "world_size": of})

    def _builder(self, prepared: Prepared) -> Builder:
        return _LoneBuilder(prepared)


class _LoneBuilder(Builder):
    """Makes what speaks to other ranks without them."""

    def make_grid(self) -> HelixGrid:
        """Make a place in the layout, and no group."""
        return HelixGrid(self._prepared.layout, rank=self._prepared.launch.rank, kvp_group=None, world_group=None)

    def make_exchange(self, heads: Heads) -> Exchange:
        """Make a merge of this rank's partials."""
        kvp = self._prepared.layout.kvp
        if kvp == 1:
            return super().make_exchange(heads)
        return _OwnHeads(heads, split_evenly(heads.num_heads, kvp, self.grid.kvp_rank), pdl=self._prepared.pdl)

    def make_query_gather(self, *, near: bool) -> _OthersHeads | None:
        """Make random queries of other ranks, where ranks next to each other would share the projections."""
        asked, kvp, dtype = self._config.attention.split_query_rows, self._prepared.layout.kvp, self._prepared.dtype
        max_rows = rows_to_split(asked, self._spec, kvp, dtype, near=True)
        if not max_rows:
            return None
        gathered = torch.randn((max_rows, self._spec.num_heads, self._spec.head_dim), dtype=dtype, device=self._device)
        return _OthersHeads(split_evenly(self._spec.num_heads, kvp, self.grid.kvp_rank), gathered)


@dataclass(frozen=True)
class _Alone(Launch):
    """The launch of a process that stands in for any rank, and speaks as rank 0 does."""

    @property
    def speaks(self) -> bool:
        """True."""
        return True


class _OwnHeads:
    """An exchange without the others: all heads' parts are merged, as they are to be sent, and this rank's kept."""

    def __init__(self, heads: Heads, own: tuple[int, int], *, pdl: bool) -> None:
        self._dtype, self._pdl, self._own = heads.dtype, pdl, slice(*own)

    def begin_step(self) -> None:
        """Do nothing."""

    def __call__(self, partials: Partials, *, layer: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Merge the parts; see ``Exchange``. Sinks, of this rank's heads, join behind it."""
        out, lse = merge_parts(partials, self._dtype, pdl=self._pdl)
        mine = out[:, self._own]
        return mine.contiguous() if sinks is None else join_sinks(mine, lse[:, self._own], sinks)


class _OthersHeads:
    """A gather of queries without the others: all heads are random, this rank's too, and nothing is copied."""

    def __init__(self, heads: tuple[int, int], gathered: torch.Tensor) -> None:
        self.heads, self.max_rows, self._gathered = heads, gathered.shape[0], gathered

    def __call__(self, mine: torch.Tensor, *, layer: int = 0) -> torch.Tensor:
        """Return what was gathered; see ``HeadGather``."""
        shape = mine.shape[0], self._gathered.shape[1], mine.shape[2]
        return self._gathered.view(-1)[: prod(shape)].view(shape)
