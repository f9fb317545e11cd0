"""Which queries of a step a KVP rank makes, where it need not make all of them, and how it gets the rest.

The ranks of a KVP group need the same queries. With keys and values of few heads they are cheaper made by every rank
than sent; with latents they are not: all heads' projections, and what takes them into the latent space, are the largest
weights of a layer's attention. So each rank makes the queries of its share of the heads, and they are gathered.

Of few rows they travel as attention takes them, in the latent space; of many as they are projected, a third as wide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from attention.latent_products import MAX_ROWS
from parallel.grid import HelixGrid
from parallel.head_gather import HeadGather
from parallel.symmetric import Faults

from .quantized import Matrix
from .query_rows import rows_that_share
from .row_share import RowShare
from .spec import ModelSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryShare:
    """This rank's part of a step's queries.

    Attributes:
        heads: the range [first, stop) that it makes, of those of its attention.
        gather: returns all rows' queries of all heads [R, Q, D] of those that the ranks made, whatever their D;
            collective over the KVP group.
        cos, sin: [R, T / 2] float32, of all rows.
        absorbs: what it makes is taken into the latent space before it travels, where the rows attend there.
    """

    heads: tuple[int, int]
    gather: Callable[[torch.Tensor], torch.Tensor]
    cos: torch.Tensor
    sin: torch.Tensor
    absorbs: bool


class QueryGather(Protocol):
    """What gathers the heads that ranks made: see ``parallel.head_gather.HeadGather``."""

    @property
    def heads(self) -> tuple[int, int]:
        """The range [first, stop) of this rank."""
        ...

    @property
    def max_rows(self) -> int:
        """Rows of a call at most."""
        ...

    def __call__(self, mine: torch.Tensor, *, layer: int = 0) -> torch.Tensor:
        """Return all heads [R, Q, D] of rows of which this rank has its own."""
        ...


class QueryShares:
    """Says which queries of latents this rank makes in a step.

    What it says depends on the step's rows alone, so it is alike on every rank of the KVP group.

    Args:
        gather: of the heads that ranks made, in steps of few rows; None where every rank makes all of them.
        num_heads: Q, of this rank's attention.
        group: the KVP group.
    """

    def __init__(self, gather: QueryGather | None, num_heads: int, group: dist.ProcessGroup | None) -> None:
        self._gather, self._num_heads, self._group = gather, num_heads, group

    def of(self, rows: RowShare | None, cos: torch.Tensor, sin: torch.Tensor, *, layer: int) -> QueryShare | None:
        """Return this rank's part of a step whose rows have these angles; None for the queries of all heads and rows.

        ``rows``: how the ranks share its rows, where they do.
        """
        num_rows = cos.shape[0]
        if rows is not None:
            gather_rows = partial(rows.gather, group=self._group)
            return QueryShare((0, self._num_heads), gather_rows, cos, sin, absorbs=False)
        if self._gather is None or not self.splits(num_rows):
            return None
        return QueryShare(
            self._gather.heads, partial(self._gather, layer=layer), cos, sin, absorbs=num_rows <= MAX_ROWS
        )

    def splits(self, num_rows: int) -> bool:
        """Return whether a step of so many rows makes this rank's share of the heads' queries, and no others."""
        return self._gather is not None and num_rows <= self._gather.max_rows


def rows_of(w: Matrix, heads: tuple[int, int], size: int) -> Any:
    """Return the rows of a range of heads, of so many rows each, as a view."""
    first, stop = heads[0] * size, heads[1] * size
    return w[first:stop] if isinstance(w, torch.Tensor) else w.rows(first, stop)


def rows_to_split(asked: int | None, spec: ModelSpec, kvp: int, dtype: torch.dtype, *, near: bool) -> int:
    """Return the most rows of a step whose queries are shared out by heads, 0 for never; what is chosen is logged.

    Args:
        asked: ``attention.split_query_rows``.
        spec: of the model.
        kvp: ranks that share them.
        dtype: of what is not quantised.
        near: whether the ranks share GPU memory.
    """
    latent = spec.latent
    if kvp == 1 or latent is None or latent.q_rank is None:
        if asked:
            reason = "kvp is 1" if kvp == 1 else "the model has no latents that queries are made of"
            _log.warning("attention.split_query_rows = %d changes nothing: %s", asked, reason)
        return 0
    if asked is not None:
        return asked
    if not near:
        _log.info("attention.split_query_rows=auto: 0, the KVP group shares no GPU memory")
        return 0
    narrow = spec.is_quantized(spec.names.q_b.format(layer=0))
    rows = rows_that_share(spec, kvp, element_bytes=dtype.itemsize, q_b_bytes=1 if narrow else dtype.itemsize)
    _log.info("attention.split_query_rows=auto: %d", rows)
    return rows


def make_query_gather(
    asked: int | None,
    spec: ModelSpec,
    grid: HelixGrid,
    *,
    dtype: torch.dtype,
    device: torch.device,
    near: bool,
    faults: Faults | None,
    timeout_s: float,
    pdl: bool,
) -> HeadGather | None:
    """Return what gathers the queries of steps of few rows; None where every rank makes all of them.

    Collective over the world: every rank calls it with equal arguments, which ``rows_to_split`` explains.
    """
    max_rows = rows_to_split(asked, spec, grid.layout.kvp, dtype, near=near)
    if not max_rows or grid.kvp_group is None:
        return None
    gather = HeadGather(
        grid.kvp_group,
        num_heads=spec.num_heads,  # latents are one KV head, so tpa is 1
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
        max_rows=max_rows,
        fused=near,
        faults=faults,
        timeout_s=timeout_s,
        pdl=pdl,
    )
    way = "symmetric memory" if gather.is_fused else "collectives"
    _log.info("queries of up to %d rows are made in %d shares of heads, gathered by %s", max_rows, grid.layout.kvp, way)
    return gather
