"""Time GPU work as it runs in a decode step: inside CUDA graphs, medians over replays, the slowest rank counts."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table

from parallel.launch import Launch, start
from scripts import cli


def start_on_gpu(device: str = "auto", *, timeout_s: float = 600.0) -> Launch:
    """Start this rank of a command that measures GPUs alone; see ``start``.

    Raises:
        ValueError: on all ranks, where one of them has no GPU of its own, or ``device`` is another one.
    """
    launch = start(device, timeout_s=timeout_s)
    if launch.device.type != "cuda":
        there = f"this node has {torch.cuda.device_count()} for {launch.local_world_size} ranks"
        why = there if device == "auto" else f"runtime.device = {device}, and {there}"
        raise ValueError(f"this command measures GPUs, one a rank: {why}")
    return launch


@triton.jit
def _read_kernel(source, largest, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TURNS * BLOCK + tl.arange(0, BLOCK)
    best = tl.load(source + at)
    for turn in tl.range(1, TURNS):
        best = tl.maximum(best, tl.load(source + at + turn * BLOCK))
    tl.store(largest + tl.program_id(0), tl.max(best, 0))


def read_bytes_per_us() -> float:
    """Measure what a streaming read of this GPU's memory reaches: floors are bytes over this."""
    programs, turns, block = 8192, 16, 4096
    source = torch.randint(1 << 30, (programs * turns * block,), dtype=torch.int32, device="cuda")  # 2 GiB
    largest = torch.empty(programs, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        _read_kernel[(programs,)](source, largest, turns, block, num_warps=8)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return source.nbytes / statistics.median(times[2:])


def graph_us(calls: Sequence[Callable[[], Any]], *, repeats: int, iterations: int = 40) -> tuple[float, float]:
    """Return the median time of one call and its spread (of the middle half of the replays), in microseconds.

    Collective over the world, where there is one. ``calls`` are taken in turn, so that inputs can be rotated past the
    L2 cache; a graph holds ``iterations`` of them and is replayed ``repeats`` times.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # all of them: a message of the next layer belongs in the other slot
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(iterations):
            calls[index % len(calls)]()
    times = []
    for replay in range(repeats + 2):
        if dist.is_initialized():
            dist.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / iterations)
    low, middle, high = statistics.quantiles(times, n=4)
    result = torch.tensor([middle, high - low], device="cuda")
    if dist.is_initialized():
        dist.all_reduce(result, dist.ReduceOp.MAX)
    return float(result[0]), float(result[1])


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for people on rank 0: a column for each key, a row for each mapping; None is a dash."""
    if cli.rank() != 0:
        return
    table = Table(title=title)
    for column in rows[0] if rows else ():
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*("-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell)
                        for cell in row.values()))  # fmt: skip
    Console(width=160).print(table)


def commit() -> str | None:
    """Return the checkout's commit, None where it is unknown."""
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip() or None


def device_name() -> str:
    """Return the name of this rank's GPU, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], **facts: Any) -> None:
    """Print a table for people and, last, one JSON line for machines, on rank 0."""
    named = [dict(zip(columns, row, strict=True)) for row in rows]
    show(title, named)
    line = {
        "bench": title,
        "gpu": device_name(),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "torch": torch.__version__,
        "commit": commit(),
        **facts,
        "rows": named,
    }
    cli.say(json.dumps(line))
