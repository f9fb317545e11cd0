"""Time all-reduce + residual + RMSNorm, fused against NCCL followed by a fused add-norm, side by side in one run.

torchrun --standalone --nproc-per-node 4 -m scripts.bench_allreduce
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from parallel.all_reduce_norm import AllReduceNorm
from parallel.launch import stop
from parallel.symmetric import Faults
from scripts import cli
from scripts.timing import graph_us, report, start_on_gpu


@dataclass(kw_only=True, slots=True)
class BenchAllreduceConfig:
    """What to measure.

    Attributes:
        hidden_size: elements of a row.
        rows: rows of a step.
        repeats: replays to take the median of.
    """

    hidden_size: int = 4096
    rows: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    repeats: int = 20


def measure(rows: int, hidden_size: int, repeats: int, group: dist.ProcessGroup) -> tuple[float, ...]:
    """Return one row of the table, in microseconds."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    weight = torch.randn(hidden_size, device=device, dtype=dtype)
    x = torch.randn(rows, hidden_size, device=device, dtype=dtype)
    residual, faults = torch.randn_like(x), Faults(device)
    times = []
    for fused in (True, False):
        op = AllReduceNorm(
            group, hidden_size=hidden_size, dtype=dtype, device=device, fused=fused, faults=faults, timeout_s=20.0,
            pdl=fused,
        )  # fmt: skip
        calls = [partial(op, x, residual, weight, 1e-5, index=index) for index in range(40)]
        times.append(graph_us(calls, repeats=repeats))
    assert int(faults.word) == 0
    (fused_us, spread_us), (nccl_us, _) = times
    return x.nbytes // 1024, rows, fused_us, spread_us, nccl_us, fused_us / nccl_us


def run(config: BenchAllreduceConfig) -> None:
    """Run the benchmark on this rank."""
    start_on_gpu()
    group = dist.group.WORLD
    if group is None:
        raise ValueError("bench_allreduce needs at least 2 ranks: start it with torchrun")
    table = [measure(rows, config.hidden_size, config.repeats, group) for rows in config.rows]
    columns = ["KiB", "rows", "fused us", "spread us", "NCCL + norm us", "fused/NCCL"]
    report("all-reduce + residual + RMSNorm", columns, table, dtype="bfloat16", hidden_size=config.hidden_size)
    stop()


if __name__ == "__main__":
    cli.main("bench_allreduce", BenchAllreduceConfig, run)
