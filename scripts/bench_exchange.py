"""Time the exchange and merge of one layer's partials, every way side by side in one run.

    torchrun --standalone --nproc-per-node 4 -m scripts.bench_exchange

fused: one kernel over symmetric memory. packed: one NCCL all-to-all of O and lse, then the merge (packing not counted).
two: an all-to-all of O, one of lse, then the merge. gather: all-gather of lse, scaling, reduce-scatter of O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from attention.fused_exchange import FusedExchange
from attention.packed import lse_words, merge_packed
from attention.partial import Partials
from parallel.collectives import all_gather, all_to_all
from parallel.launch import stop
from parallel.symmetric import Faults
from scripts import cli
from scripts.timing import graph_us, report, start_on_gpu


@dataclass(kw_only=True, slots=True)
class BenchExchangeConfig:
    """What to measure.

    Attributes:
        rows: rows of a step.
        shapes: [heads, head_dim] of the whole KVP group.
        repeats: replays to take the median of.
    """

    rows: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256])
    shapes: list[list[int]] = field(default_factory=lambda: [[64, 128], [128, 512]])
    repeats: int = 20


def gather_and_scatter(out: torch.Tensor, lse: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Merge by scaling before the sum: all-gather lse, weigh own partial, reduce-scatter."""
    weight = torch.exp(lse - torch.logsumexp(all_gather(lse, group), 0)).unsqueeze(-1)
    parts = (out * weight).to(out.dtype).unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    merged = torch.empty_like(parts[0])
    dist.reduce_scatter(merged, list(parts.unbind(0)), group=group)
    return merged


def two_messages(o: torch.Tensor, lse: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Exchange O and lse [N, R, H, ...] by an all-to-all each, then merge."""
    o, lse = all_to_all(o, group), all_to_all(lse, group)
    message = torch.cat([o, lse.unsqueeze(-1).view(o.dtype)], -1)
    return merge_packed(message, o.shape[2], o.shape[3])


def measure(heads: int, head_dim: int, rows: int, repeats: int, group: dist.ProcessGroup) -> tuple[float, ...]:
    """Return one row of the table, in microseconds."""
    world, mine, device, dtype = group.size(), heads // group.size(), torch.device("cuda"), torch.bfloat16
    out = torch.randn(rows, heads, head_dim, device=device, dtype=dtype)
    lse = torch.randn(rows, heads, device=device)
    faults = Faults(device)
    fused = FusedExchange(
        group, num_heads=heads, head_dim=head_dim, num_layers=40, dtype=dtype, device=device, faults=faults,
        timeout_s=20.0, pdl=True,
    )  # fmt: skip
    fused.begin_step()
    layers = [partial(fused, Partials(out, lse), layer=layer) for layer in range(40)]
    fused_us, spread_us = graph_us(layers, repeats=repeats)
    assert int(faults.word) == 0
    packed = torch.randn(world, rows, mine, head_dim + lse_words(dtype), device=device).to(dtype)
    o_all, lse_all = packed[..., :head_dim].contiguous(), torch.randn(world, rows, mine, device=device)
    packed_us, _ = graph_us([lambda: merge_packed(all_to_all(packed, group), mine, head_dim)], repeats=repeats)
    two_us, _ = graph_us([lambda: two_messages(o_all, lse_all, group)], repeats=repeats)
    gather_us, _ = graph_us([lambda: gather_and_scatter(out, lse, group)], repeats=repeats)
    return heads, head_dim, rows, fused_us, spread_us, packed_us, two_us, gather_us, fused_us / packed_us


def run(config: BenchExchangeConfig) -> None:
    """Run the benchmark on this rank."""
    start_on_gpu()
    group = dist.group.WORLD
    if group is None:
        raise ValueError("bench_exchange needs at least 2 ranks: start it with torchrun")
    table = [
        measure(heads, head_dim, rows, config.repeats, group)
        for heads, head_dim in config.shapes
        for rows in config.rows
    ]
    columns = ["heads", "head_dim", "rows", "fused us", "spread us", "packed us", "two us", "gather us", "fused/packed"]
    report("exchange + merge", columns, table, dtype="bfloat16", repeats=config.repeats)
    stop()


if __name__ == "__main__":
    cli.main("bench_exchange", BenchExchangeConfig, run)
