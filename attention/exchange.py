"""The exchange over the KVP group: all-to-all of partials, then the merge.

Every KVP rank holds partial results of the same rows and query heads over its own shard. Rank k receives everyone's
partials for its own 1/KVP of the heads and merges them by log-sum-exp; what it holds then is the input of its slice of
the output projection. The message is rows x heads/KVP x (D + lse) per peer whatever the context length
(arXiv 2507.07120, section 2.1).

Heads that KVP does not divide are split as evenly as possible: the first ranks take one more, and messages are padded
to that size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from parallel.collectives import all_to_all
from parallel.launch import minimum
from parallel.layout import split_evenly
from parallel.symmetric import Faults, shares_memory

from .fused_exchange import FusedExchange, supports
from .merge import join_sinks, merge_parts, merge_reference
from .packed import merge_packed, pack, pack_reference, unpack
from .partial import Partials

EXCHANGES = ("auto", "collective", "fused")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Heads:
    """What an exchange carries: Q heads a rank, D elements a head, their dtype and device, layers a step."""

    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    num_layers: int


class Exchange(Protocol):
    """Turns local partials into this rank's merged heads."""

    def begin_step(self) -> None:
        """Stand before the first layer of every step."""
        ...

    def __call__(self, partials: Partials, *, layer: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Merge one layer's partials over parts and ranks.

        Collective over the KVP group: every rank calls it with partials of the same R rows, layer by layer in the same
        order; how many partials a row has may differ between ranks.

        Args:
            partials: of R rows over this rank's shard; the collective exchange takes any D, the same on every rank.
            layer: which exchange of the step this is.
            sinks: [heads of this rank] float32, scores without a value that join the merge of each row; None for none.

        Returns:
            [R, heads of this rank, D] in the model's dtype.
        """
        ...


class NoExchange:
    """The exchange of a group of one: the parts of a row are merged."""

    def __init__(self, dtype: torch.dtype, *, pdl: bool = False) -> None:
        self._dtype, self._pdl = dtype, pdl

    def begin_step(self) -> None:
        """Do nothing."""

    def __call__(self, partials: Partials, *, layer: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Merge the parts; see ``Exchange``."""
        return merge_parts(partials, self._dtype, sinks=sinks, pdl=self._pdl)[0]


class CollectiveExchange:
    """One packed all-to-all (O and lse in one message) and one merge, over NCCL or gloo.

    Args:
        group: the KVP group.
        heads: what it carries; num_heads is equal on all ranks of the group. Heads may have any even size.
    """

    def __init__(self, group: dist.ProcessGroup, heads: Heads) -> None:
        self._group, self._dtype = group, heads.dtype
        start, stop = split_evenly(heads.num_heads, group.size(), group.rank())
        self._heads = stop - start

    def begin_step(self) -> None:
        """Do nothing."""

    def __call__(self, partials: Partials, *, layer: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Merge the parts, exchange and merge; see ``Exchange``."""
        out, lse = merge_parts(partials, self._dtype)
        packing = pack if out.is_cuda else pack_reference
        received = all_to_all(packing(out, lse, self._group.size()), self._group)
        if received.is_cuda:
            return merge_packed(received, self._heads, out.shape[-1], sinks)
        merged, lse = merge_reference(*unpack(received[:, :, : self._heads], out.shape[-1]))
        return merged if sinks is None else join_sinks(merged, lse, sinks)


class BySizeExchange:
    """The fused exchange for steps of few rows and heads of its size, else the collective one; alike on every rank."""

    def __init__(self, fused: FusedExchange, collective: CollectiveExchange) -> None:
        self._fused, self._collective = fused, collective

    def begin_step(self) -> None:
        """Advance the fused exchange's step counter."""
        self._fused.begin_step()

    def __call__(self, partials: Partials, *, layer: int = 0, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Exchange and merge; see ``Exchange``."""
        fits = partials.num_rows <= self._fused.max_rows and partials.out.shape[-1] == self._fused.head_dim
        return (self._fused if fits else self._collective)(partials, layer=layer, sinks=sinks)


def make_exchange(
    name: str,
    *,
    group: dist.ProcessGroup | None,
    heads: Heads,
    faults: Faults | None = None,
    timeout_s: float = 600.0,
    pdl: bool = False,
) -> Exchange:
    """Return the exchange for a KVP group; ``group`` of None is a group of one.

    ``auto`` is fused, for steps of not too many rows, where the group shares memory and the heads fit its granules,
    and collective elsewhere; the choice is logged. Collective over the world.

    Raises:
        ValueError: on all ranks, when ``name`` is none of EXCHANGES, or fused is asked for where it cannot run.
    """
    if name not in EXCHANGES:
        raise ValueError(f"attention.exchange = {name!r} must be one of {', '.join(EXCHANGES)}")
    if group is None:
        return NoExchange(heads.dtype, pdl=pdl)
    near = minimum(int(shares_memory(group, heads.device))) == 1
    reason = "" if near else "the KVP group shares no GPU memory"
    if near and not supports(heads.head_dim, heads.dtype):
        reason = f"heads of {heads.head_dim} {heads.dtype} do not fill a power of two of 16-byte granules"
    if name == "fused" and (reason or faults is None):
        raise ValueError(f"attention.exchange = fused cannot run here: {reason}; use attention.exchange=auto")
    collective = CollectiveExchange(group, heads)
    if name == "auto" and reason:
        _log.info("attention.exchange=auto: collective, %s", reason)
    if name == "collective" or reason or faults is None:
        return collective
    fused = FusedExchange(
        group,
        num_heads=heads.num_heads,
        head_dim=heads.head_dim,
        num_layers=heads.num_layers,
        dtype=heads.dtype,
        device=heads.device,
        faults=faults,
        timeout_s=timeout_s,
        pdl=pdl,
    )
    if name == "auto":
        _log.info("attention.exchange=auto: fused up to %d rows", fused.max_rows)
    return BySizeExchange(fused, collective)
