"""Ranks that never arrived where others waited for them: what the word that a kernel left says, as an error."""

from __future__ import annotations

import torch.distributed as dist

from attention.fused_exchange import OPERATION as EXCHANGE
from parallel.all_reduce_norm import OPERATION as ALL_REDUCE
from parallel.grid import HelixGrid
from parallel.head_gather import OPERATION as HEAD_GATHER
from parallel.sharded_argmax import OPERATION as ARGMAX
from parallel.symmetric import Faults


class RankLost(RuntimeError):
    """A rank did not arrive where others waited for it; the message names it, the operation and the layer."""


def raise_lost(word: int, grid: HelixGrid) -> None:
    """Raise RankLost where a fault word says that a kernel gave up waiting for a rank."""
    fault = Faults.decode(word)
    if fault is None:
        return
    group = grid.kvp_group if fault.operation in (EXCHANGE, HEAD_GATHER) else grid.world_group
    assert group is not None
    peer = dist.get_process_group_ranks(group)[fault.peer]
    what = {
        ALL_REDUCE: f"all-reduce of layer {fault.layer}",
        EXCHANGE: f"exchange of layer {fault.layer}",
        ARGMAX: "choice of tokens",
        HEAD_GATHER: f"gather of queries of layer {fault.layer}",
    }
    raise RankLost(f"rank {peer} never arrived at the {what[fault.operation]}")
