"""Time attention over one shard, or with its exchange and merge over ranks, beside the peers in one run.

    python -m scripts.bench_attention                                          decode alone, for a list of shapes
    python -m scripts.bench_attention rows=8192 shapes='[[1,65536,16,1]]'      a prefill chunk: the last 8,192 tokens
    python -m scripts.bench_attention cache.dtype=fp8_e4m3                     decode over pages of 8 bits, and of 16
    torchrun --standalone --nproc-per-node 4 -m scripts.bench_attention        attention + exchange + merge of a layer

ours: the partial attention kernel alone, then with the merge of its parts. SDPA: torch's, over a dense cache, without
lse. FlashInfer: paged, with lse, the better of its ways (decode with and without tensor cores, prefill by fa2 and fa3).
Over ranks: ours is attention + fused exchange. A peer is its attention + packed NCCL all-to-all + merge, with packing;
"unpacked" leaves packing out. SDPA has no lse, so a random one of the same shape travels. With cache.dtype=fp8_e4m3
ours and its floor are of pages in 8 bits, and peers read in 16 bits what these mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from attention.backends import select_backend
from attention.exchange import CollectiveExchange, Exchange, Heads, make_exchange
from attention.merge import merge_parts
from attention.packed import lse_words, merge_packed
from attention.pages import PageLayout
from attention.partial import PartialAttention, Partials
from helix.config import AttentionConfig, check_at_least, check_choice
from parallel.collectives import all_to_all
from parallel.launch import set_up_logging, stop
from parallel.layout import split_evenly
from parallel.symmetric import Faults, can_launch_dependently
from scripts import cli
from scripts.attention_peers import (
    Attend,
    Case,
    Shape,
    agree_on,
    flashinfer_runs,
    load_flashinfer,
    make_case,
    mixed_rows,
    quantized,
    sdpa,
)
from scripts.dummy_weights import BenchCache
from scripts.timing import graph_us, read_bytes_per_us, report, start_on_gpu

NUM_SLOTS = 2
"""Layers of the exchange: neighbouring calls need different slots, so every list of calls has an even length."""


@dataclass(kw_only=True, slots=True)
class BenchAttentionConfig:
    """What to measure.

    Attributes:
        shapes: of attention alone: [sequences, local tokens, query heads, KV heads].
        rows: query rows of each sequence there: its last tokens.
        mixed: batches of these local lengths with ``heads``, beside equal ones of the same total.
        lengths: local tokens of the one sequence that is measured over ranks.
        heads: [query heads, KV heads] of a rank there.
        head_dim: elements a head.
        block_size: tokens a page; lengths are multiples of it.
        dtype: bfloat16 or float16.
        cache: its dtype, as ``cache.dtype`` of a run.
        rotated_bytes: inputs are copied until they fill so much, so that none is still in the L2 cache.
        pdl: launch our kernels programmatically dependent, as the runtime does: a call's first loads overlap the end of
            the one before. FlashInfer decides for itself.
        repeats: replays to take the median of.
    """

    shapes: list[list[int]] = field(
        default_factory=lambda: [
            [1, 4096, 16, 1], [1, 16384, 16, 1], [1, 65536, 16, 1], [1, 262144, 16, 1], [1, 16384, 32, 4],
            [1, 65536, 32, 4], [8, 16384, 16, 1], [8, 65536, 16, 1], [32, 16384, 16, 1], [1, 131072, 64, 8],
        ]
    )  # fmt: skip
    rows: int = 1
    mixed: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 65536, 262144])
    heads: list[int] = field(default_factory=lambda: [16, 1])
    head_dim: int = 128
    block_size: int = 64
    dtype: str = "bfloat16"
    cache: BenchCache = field(default_factory=BenchCache)
    rotated_bytes: int = 1 << 30
    pdl: bool = True
    repeats: int = 20

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("bfloat16", "float16"))
        check_at_least("repeats", self.repeats, 2)
        check_at_least("rows", self.rows, 1)
        check_at_least("rotated_bytes", self.rotated_bytes, 1)
        if not self.shapes or not self.lengths:
            raise ValueError(f"shapes = {self.shapes} and lengths = {self.lengths} must not be empty")
        for name, sizes, count in [("shapes", shape, 4) for shape in self.shapes] + [("heads", self.heads, 2)]:
            if len(sizes) != count:
                raise ValueError(f"{name}: {sizes} must be {count} numbers")
        if self.in_8_bits and self.rows >= AttentionConfig().expand_rows:
            raise ValueError(
                f"rows = {self.rows} with cache.dtype = {self.cache.dtype}: a run widens pages for so many rows "
                "(attention.expand_rows); time them with cache.dtype=auto"
            )
        self.local_shapes()
        self.rank_shapes()

    @property
    def in_8_bits(self) -> bool:
        """Whether ours reads pages of 8 bits."""
        return self.cache.dtype == "fp8_e4m3"

    def local_shapes(self) -> list[Shape]:
        """Return the shapes of attention alone."""
        return [Shape(*sizes, self.head_dim, self.block_size, self.rows) for sizes in self.shapes]

    def rank_shapes(self) -> list[Shape]:
        """Return the shapes of a rank's shard, one sequence each."""
        return [Shape(1, length, *self.heads, self.head_dim, self.block_size) for length in self.lengths]


@dataclass(frozen=True)
class Bench:
    """What all shapes share: settings, device, dtype, our attention, FlashInfer or None, whether ours launches
    dependently, and the rate of a streaming read.
    """

    config: BenchAttentionConfig
    device: torch.device
    dtype: torch.dtype
    attention: PartialAttention
    flashinfer: Any
    pdl: bool
    read_bytes_per_us: float

    def floor_us(self, shape: Shape) -> float:
        """Return the time to read K and V once, in microseconds."""
        held = PageLayout(shape.kv_heads, shape.block_size, shape.head_dim, self.dtype, in_8_bits=self.config.in_8_bits)
        return shape.batch * shape.tokens * held.token_bytes / self.read_bytes_per_us

    def case(self, shape: Shape) -> Case:
        """Return random inputs of a shape, in copies that fill ``rotated_bytes``, with our work list."""
        case = make_case(shape, shape.num_copies(self.dtype, self.config.rotated_bytes), self.dtype, self.device)
        return self.cut(quantized(case) if self.config.in_8_bits else case)

    def cut(self, case: Case) -> Case:
        """Return a case with the work list that our kernel wants for its pages."""
        shape = case.shape
        cutting = self.attention.cutting(case.held(0), shape.heads, shape.rows)
        return replace(case, rows=case.rows.cut_for(cutting, shape.block_size))

    def us(self, case: Case, call_of: Callable[[int, int], Attend]) -> tuple[float, float]:
        """Time ``call_of(copy, slot)`` over all copies in turn: median and spread, in microseconds."""
        copies = case.pages.shape[0]
        count = max(40 if case.shape.rows == 1 else 4, copies + copies % NUM_SLOTS)
        calls = [call_of(index % copies, index % NUM_SLOTS) for index in range(count)]
        return graph_us(calls, repeats=self.config.repeats, iterations=count)

    def ours(self, case: Case, copy: int) -> Callable[[], Partials]:
        """Return a call of our attention over one copy, with parts not merged."""
        return partial(self.attention, case.q, case.held(copy), case.rows, case.scale)

    def flashinfer_runs(self, case: Case) -> list[Any]:
        """Return FlashInfer's ways over this case, each checked; none where it is missing."""
        runs = flashinfer_runs(self.flashinfer, case) if self.flashinfer is not None else []
        for run in runs:
            agree_on(case, run(case.pages[0])[0])
        return runs


def least(times: Sequence[float | None]) -> float | None:
    """Return the smallest time that was measured, None without any."""
    return min((each for each in times if each is not None), default=None)


def measure_mixed(bench: Bench, lengths: Sequence[int]) -> dict[str, Any]:
    """Return one row of the table of unequal lengths: our attention and merge beside that of equal ones."""
    config, times = bench.config, []
    for each in (lengths, [sum(lengths) // len(lengths) // config.block_size * config.block_size] * len(lengths)):
        tokens = sum(-(-length // config.block_size) for length in each) * config.block_size
        whole = Shape(1, tokens, *config.heads, config.head_dim, config.block_size)
        case = bench.case(whole)
        case = replace(case, rows=mixed_rows(each, config.block_size, bench.device))
        cutting = bench.attention.cutting(case.held(0), whole.heads, 1)
        q = torch.randn(len(each), whole.heads, whole.head_dim, dtype=bench.dtype, device=bench.device)
        case = replace(case, q=q, rows=case.rows.cut_for(cutting, whole.block_size))

        def merged(copy: int, case: Case = case) -> torch.Tensor:
            return merge_parts(bench.ours(case, copy)(), bench.dtype, pdl=bench.pdl)[0]

        times.append(bench.us(case, lambda copy, _, merged=merged: partial(merged, copy))[0])  # type: ignore[misc]
    return {
        "B": len(lengths), "longest": max(lengths), "total": sum(lengths), "floor us": bench.floor_us(whole),
        "mixed us": times[0], "equal us": times[1], "mixed/equal": times[0] / times[1],
    }  # fmt: skip


def measure(bench: Bench, shape: Shape) -> dict[str, Any]:
    """Return one row of the table of attention alone."""
    case = bench.case(shape)

    def merged(copy: int) -> torch.Tensor:
        return merge_parts(bench.ours(case, copy)(), bench.dtype, pdl=bench.pdl)[0]

    agree_on(case, merged(0))
    alone_us, spread_us = bench.us(case, lambda copy, _: bench.ours(case, copy))
    merged_us, _ = bench.us(case, lambda copy, _: partial(merged, copy))
    sdpa_us, _ = bench.us(case, lambda copy, _: sdpa(case, copy))
    flashinfer_us = least(
        [
            bench.us(case, lambda copy, _, run=run: partial(run, case.pages[copy]))[0]  # type: ignore[misc]
            for run in bench.flashinfer_runs(case)
        ]
    )
    best_us = least([sdpa_us, flashinfer_us])
    assert best_us is not None
    row: dict[str, Any] = {
        "B": shape.batch, "S": shape.tokens, "Q/K": f"{shape.heads}/{shape.kv_heads}",
        "floor us": bench.floor_us(shape), "ours us": alone_us, "spread us": spread_us, "+ merge us": merged_us,
        "SDPA us": sdpa_us, "FlashInfer us": flashinfer_us, "ours/best": alone_us / best_us,
        "merged/best": merged_us / best_us, "TFLOP/s": shape.flops() / merged_us / 1e6,
    }  # fmt: skip
    if case.in_8_bits:
        plain = bench.cut(replace(case, in_8_bits=()))
        row["16 bits us"], _ = bench.us(plain, lambda copy, _: bench.ours(plain, copy))
        row["8/16 bits"] = alone_us / row["16 bits us"]
    return row


@dataclass(frozen=True)
class Exchanges:
    """Our exchange and the peers': packed NCCL all-to-all + merge, and the same of a message that is packed already."""

    ours: Exchange
    packed: Exchange
    message: torch.Tensor
    num_merged: int

    def unpacked(self, head_dim: int) -> torch.Tensor:
        """Exchange and merge a message without packing it."""
        assert dist.group.WORLD is not None
        return merge_packed(all_to_all(self.message, dist.group.WORLD), self.num_merged, head_dim)


def make_exchanges(bench: Bench, shape: Shape, faults: Faults | None) -> Exchanges:
    """Return the exchanges of a shape's heads over the world. Collective over the world."""
    group = dist.group.WORLD
    assert group is not None
    heads = Heads(shape.heads, shape.head_dim, bench.dtype, bench.device, num_layers=NUM_SLOTS)
    ours = make_exchange("auto", group=group, heads=heads, faults=faults, timeout_s=20.0, pdl=bench.pdl)
    first, end = split_evenly(shape.heads, group.size(), group.rank())
    padded, width = -(-shape.heads // group.size()), shape.head_dim + lse_words(bench.dtype)
    message = torch.randn(group.size(), shape.batch, padded, width, device=bench.device).to(bench.dtype)
    return Exchanges(ours, CollectiveExchange(group, heads), message, end - first)


def measure_ranks(bench: Bench, shape: Shape, exchanges: Exchanges) -> dict[str, Any]:
    """Return one row of the table of attention + exchange + merge. Collective over the world."""
    case = bench.case(shape)
    random_lse = torch.randn(shape.batch, shape.heads, device=bench.device)
    exchanges.ours.begin_step()

    def whole(copy: int, slot: int) -> torch.Tensor:
        return exchanges.ours(bench.ours(case, copy)(), layer=slot)

    def dense(copy: int) -> Partials:
        return Partials(sdpa(case, copy)().squeeze(2), random_lse)

    def paged(run: Any, copy: int) -> Partials:
        return Partials(*run(case.pages[copy]))

    def composed(attend: Callable[[int], Partials]) -> tuple[float, float]:
        """Return the time of a peer's attention with its exchange, with packing and without."""

        def unpacked(copy: int) -> torch.Tensor:
            attend(copy)
            return exchanges.unpacked(shape.head_dim)

        with_us, _ = bench.us(case, lambda copy, _: lambda: exchanges.packed(attend(copy)))
        return with_us, bench.us(case, lambda copy, _: partial(unpacked, copy))[0]

    ours_us, spread_us = bench.us(case, lambda copy, slot: partial(whole, copy, slot))
    sdpa_us, sdpa_unpacked_us = composed(dense)
    others = [composed(partial(paged, run)) for run in bench.flashinfer_runs(case)]
    flashinfer_us = least([with_us for with_us, _ in others])
    best_us = least([sdpa_us, flashinfer_us])
    unpacked_us = least([sdpa_unpacked_us, *(without_us for _, without_us in others)])
    assert best_us is not None and unpacked_us is not None
    return {
        "S/KVP": shape.tokens, "Q/K": f"{shape.heads}/{shape.kv_heads}", "floor us": bench.floor_us(shape),
        "ours us": ours_us, "spread us": spread_us, "SDPA + packed us": sdpa_us,
        "FlashInfer + packed us": flashinfer_us, "best unpacked us": unpacked_us, "ours/best": ours_us / best_us,
        "ours/unpacked": ours_us / unpacked_us,
    }  # fmt: skip


def run(config: BenchAttentionConfig) -> None:
    """Run the benchmark on this rank: attention alone in a world of one, with its exchange in a larger one."""
    launch = start_on_gpu()
    set_up_logging(launch.rank)
    dtype, pdl = getattr(torch, config.dtype), config.pdl and can_launch_dependently(launch.device)
    rows = config.rows if launch.world_size == 1 else 1
    flashinfer, reason = load_flashinfer(config.head_dim, rows, dtype, launch.device)
    if flashinfer is None:
        cli.say(f"FlashInfer is not measured: {reason}")
    attention = select_backend("auto", launch.device, pdl=pdl)
    bench = Bench(config, launch.device, dtype, attention, flashinfer, pdl, read_bytes_per_us())
    if config.mixed:
        title, table = "attention of unequal lengths", [measure_mixed(bench, lengths) for lengths in config.mixed]
    elif launch.world_size == 1:
        title, table = "attention", [measure(bench, shape) for shape in config.local_shapes()]
    else:
        shapes, faults = config.rank_shapes(), Faults(launch.device)
        exchanges = make_exchanges(bench, shapes[0], faults)  # what they carry does not depend on the length
        title, table = "attention + exchange + merge", [measure_ranks(bench, shape, exchanges) for shape in shapes]
        if fault := Faults.decode(int(faults.word)):
            raise RuntimeError(f"rank {launch.rank} gave up waiting for rank {fault.peer} in an exchange")
    report(
        title, list(table[0]), [list(row.values()) for row in table], dtype=config.dtype, cache=config.cache.dtype,
        head_dim=config.head_dim, block_size=config.block_size, rows_a_sequence=rows, pdl=pdl, repeats=config.repeats,
        flashinfer=getattr(flashinfer, "__version__", None), read_bytes_per_us=bench.read_bytes_per_us,
    )  # fmt: skip
    stop()


if __name__ == "__main__":
    cli.main("bench_attention", BenchAttentionConfig, run)
