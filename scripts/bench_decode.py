"""TTL of a whole model's decode step for several layouts, over a filled cache, beside the step's byte floor.

    torchrun --standalone --nproc-per-node 4 -m scripts.bench_decode model=glm4_9b_1m \
        layouts='[[2,2],[4,1],[1,4]]' cases='[[131072,1],[131072,8]]'

    python -m scripts.bench_decode model=deepseek_v3_4_layers rank=0 of=8 cases='[[131072,1],[32768,8]]'

The second measures one rank of a layout on one GPU: its slices alone, without the others, whose collectives are left
out and named.

Weights and cache are random. Steps are launched back to back, each fed by the tokens that the one before it left on the
device, as the runtime does. Layouts are [kvp, tpa], cases [context in tokens, batch]. Beside what was measured stands
what the model of cost predicts, where the GPU's constants are known or ``runtime.hardware`` names them.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl

from helix.cache.pool import BlockTable
from helix.cache.windows import WindowTable
from helix.checks import check_at_least
from helix.config import (
    AttentionConfig,
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from helix.graphs import DecodeGraphs
from helix.llm import LLM
from helix.lone_rank import LEFT_OUT, LoneRank
from helix.models.weights import EXPERT_ROLES
from helix.predicted import cost_of
from helix.prediction import find_hardware
from helix.request import Chunk, RequestOutput, Sequence
from helix.sampling import SamplingParams
from parallel.launch import gather_values, set_up_logging, stop
from scripts import cli
from scripts.dummy_weights import BenchCache, check_pairs, check_weights, fill_pages, with_weights
from scripts.timing import read_bytes_per_us, report, start_on_gpu

PARTS = {
    "attention": (
        "_stream_kv_kernel",
        "_stream_eight_bits_kernel",
        "_stream_latent_kernel",
        "_stream_latent_bytes_kernel",
        "_stream_latent_eight_bits_kernel",
        "_split_kernel",
        "_latent_kernel",
        "_merge_parts_kernel",
    ),
    "exchange": ("_exchange_kernel", "_pack_kernel", "_merge_packed_kernel", "AllToAll"),
    "all-reduce": ("_fused_kernel", "_add_norm_kernel", "AllReduce"),
    "GEMMs": (
        "stream_weights_kernel",
        "stream_quantized_kernel",
        "_in_use_kernel",
        "_queue_kernel",
        "_gate_up_kernel",
        "_down_kernel",
        "gemm",
        "gemv",
        "cublas",
        "nvjet",
        "splitK",
    ),
    "states": ("_advance_kernel",),
    "append": ("_append_kernel", "_queries_kernel", "_values_kernel"),
}


@dataclass(kw_only=True, slots=True)
class BenchDecodeConfig:
    """What to measure.

    Attributes:
        layouts: [kvp, tpa] of each layout; empty is [2, 2], [4, 1] and [1, 4], or with ``of`` [of, 1].
        cases: [context, batch] of each case, in tokens and sequences.
        rank: the rank of each layout that is measured alone, in one process; None starts all ranks.
        of: how many ranks there would be; it comes with ``rank``.
        ep: ways the experts are split, in every layout.
        weights: bf16, or fp8: blocks of 128 x 128 in 8 bits; or fp8_head: the output head as well.
        cache: its dtype, as ``cache.dtype`` of a run.
        split_query_rows: as ``attention.split_query_rows`` of a run.
        block_size: tokens a page.
        steps: decode steps a measurement.
        profile: also time the parts of a step.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    layouts: list[list[int]] = field(default_factory=list)
    cases: list[list[int]] = field(default_factory=lambda: [[131072, 1], [131072, 8], [524288, 1]])
    rank: int | None = None
    of: int | None = None
    ep: int = 1
    weights: str = "bf16"
    cache: BenchCache = field(default_factory=BenchCache)
    split_query_rows: int | None = None
    block_size: int = 64
    steps: int = 60
    profile: bool = True

    def __post_init__(self) -> None:
        check_weights(self.weights, self.model)
        if (self.rank is None) != (self.of is None):
            raise ValueError(f"rank = {self.rank} and of = {self.of} come together: rank=0 of=8 is the first of eight")
        if not self.layouts:
            self.layouts = [[2, 2], [4, 1], [1, 4]] if self.of is None else [[self.of, 1]]
        check_pairs("layouts", self.layouts, "[kvp, tpa]")
        check_pairs("cases", self.cases, "[context, batch]")
        check_at_least("steps", self.steps, 1)
        for kvp, tpa in self.layouts:
            if self.of is not None and kvp * tpa != self.of:
                raise ValueError(f"layouts: [{kvp}, {tpa}] has {kvp * tpa} ranks, but of = {self.of}; they must agree")


def filled_sequences(llm: LLM, context: int, batch: int) -> list[Sequence]:
    """Return running sequences whose caches hold ``context`` random tokens, with room to grow."""
    place, pages = llm.placement, [0] * llm.layout.kvp
    sequences = []
    for index in range(batch):
        table = BlockTable(first_owner=index % place.kvp)
        for block in range(place.num_blocks(context + 4096)):
            owner = (block + table.first_owner) % place.kvp
            table.pages.append(pages[owner])
            pages[owner] += 1
        seq = Sequence(
            index=index, token_ids=[1] * context, prompt_len=context, sampling=SamplingParams(), seed=0,
            max_len=context + 4096, output=RequestOutput(None),
        )  # fmt: skip
        seq.blocks, seq.batch_slot = table, index
        sequences.append(seq)
    if llm.runner.decoder.windows is not None:
        _fill_windows(llm, sequences, context)
    return sequences


def _fill_windows(llm: LLM, sequences: list[Sequence], context: int) -> None:
    """Give sequences pages of their windows, with room to grow, of which far ones may be the same."""
    size, num_pages = llm.placement.block_size, llm.runner.decoder.windows[0].shape[0]
    first = max(0, context - llm.spec.window) // size
    count = -(-(context + 4096) // size) - first
    near = num_pages // len(sequences)  # from one sequence's pages to the next's
    for index, seq in enumerate(sequences):
        seq.blocks.window = WindowTable(first, [(index * near + block) % num_pages for block in range(count)])


def floor_bytes(llm: LLM, context: int, batch: int) -> tuple[int, int]:
    """Return the bytes of this rank's KV and states, and of the weights that a step reads: all layers', and the head's.

    States are read and written.
    """
    spec, decoder = llm.spec, llm.runner.decoder
    kv = llm.footprint.token_bytes * llm.placement.local_len(context, 0) * batch
    if decoder.states is not None:
        kv += 2 * decoder.states.matrix_bytes * batch
    weights = decoder.layer_bytes + decoder.top["lm_head"].nbytes
    first, stop = decoder.part.out_heads
    others = 1 - (stop - first) / decoder.num_heads
    unread = ("v_up", "q_b", "k_up") if decoder.query_shares.splits(batch) else ("v_up",)  # of heads that others make
    weights -= int(others * sum(layer[role].nbytes for layer in decoder.layers for role in unread if role in layer))
    if spec.experts is not None:  # of those only what the batch chooses, each expert equally likely
        held = sum(layer[role].nbytes for layer in decoder.layers for role in EXPERT_ROLES if role in layer)
        weights -= int(held * (1 - spec.experts.num_chosen / spec.experts.num_experts) ** batch)
    return kv, weights


@triton.jit
def _stamp_kernel(times, step, at_end: tl.constexpr, LENGTH: tl.constexpr):
    now = tl.load(step)
    tl.store(times + 2 * (now % LENGTH) + at_end, tl.extra.cuda.globaltimer())
    if at_end:
        tl.store(step, now + 1)


class Stamps:
    """Notes on the device when each captured step begins and ends, so that the time between steps needs no profiler."""

    LENGTH = 256

    def __init__(self) -> None:
        self._times = torch.zeros(2 * self.LENGTH, dtype=torch.int64, device="cuda")
        self._step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def wrap(self) -> None:
        """Put a stamp before and after every step that is captured from now on."""
        step = DecodeGraphs._step

        def stamped(graphs: DecodeGraphs, *args: Any) -> None:
            self._put(False)
            step(graphs, *args)
            self._put(True)

        DecodeGraphs._step = stamped  # type: ignore[method-assign]

    def between_us(self, steps: int) -> float:
        """Return the median time from the end of a step to the beginning of the next, over the last steps."""
        torch.cuda.synchronize()
        last, times = int(self._step), self._times.view(-1, 2).tolist()
        kept = [times[number % self.LENGTH] for number in range(last - min(steps, self.LENGTH), last)]
        return statistics.median(b[0] - a[1] for a, b in itertools.pairwise(kept)) / 1e3

    def _put(self, at_end: bool) -> None:
        _stamp_kernel[(1,)](self._times, self._step, at_end, self.LENGTH, num_warps=1)


@dataclass(frozen=True)
class Meter:
    """How cases are measured: steps a measurement, a profile of parts or none, and what a read of memory reaches."""

    steps: int
    profile: bool
    stamps: Stamps
    bytes_per_us: float


def measure(llm: LLM, context: int, batch: int, meter: Meter) -> dict[str, Any]:
    """Return TTL and parts of one case, in milliseconds, and the time between two steps."""
    sequences = filled_sequences(llm, context, batch)
    runner = llm.runner
    if runner.decoder.states is not None:
        runner.decoder.states.pretend(context - 1)
    pending = runner.launch([Chunk(seq, context - 1, context) for seq in sequences])
    pending.wait()

    def run(count: int) -> float:
        began, waiting = time.perf_counter(), []
        for _ in range(count):
            for seq in sequences:
                seq.token_ids.append(-1)  # the token that the device chose last
            length = len(sequences[0].token_ids)
            waiting.append(runner.launch([Chunk(seq, length - 1, length) for seq in sequences]))
            if len(waiting) == 3:
                waiting.pop(0).wait()
        for each in waiting:
            each.wait()
        return (time.perf_counter() - began) / count * 1e3

    run(10)
    ttl = statistics.median(run(meter.steps) for _ in range(3))
    runner.check_faults()
    between = meter.stamps.between_us(meter.steps)
    kv, weights = (each / meter.bytes_per_us / 1e3 for each in floor_bytes(llm, context, batch))
    row: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "TTL ms": ttl,
        "floor ms": kv + weights,
        "x floor": ttl / (kv + weights),
        "KV floor ms": kv,
        "weights floor ms": weights,
        "between %": between / ttl / 10,
    }
    return row | (parts_of(run) if meter.profile else {})


def parts_of(run: Any) -> dict[str, float]:
    """Profile a few steps: milliseconds that each part adds to a step, and the share of a step without any kernel.

    Kernels overlap (each is launched before the one before it has ended), so what one adds is the time from the end of
    whatever ended before it to its own end.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(5)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.end, event.time_range.start, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.elapsed_us() > 0
    )
    totals: dict[str, float] = defaultdict(float)
    began = reached = min(begin for _, begin, _ in spans)
    gaps = 0.0
    for end, begin, name in spans:
        part = next((part for part, names in PARTS.items() if any(each in name for each in names)), "other")
        totals[part] += (end - max(reached, begin)) / 5e3
        if "_embed_kernel" not in name and "Mem" not in name and "_stamp" not in name:  # between steps: see Stamps
            gaps += max(0.0, begin - reached)
        reached = end
    parts = {f"{part} ms": totals[part] for part in [*PARTS, "other"]}
    return parts | {"gaps inside %": 100 * gaps / (reached - began)}


def run(config: BenchDecodeConfig) -> None:
    """Run the benchmark on this rank."""
    launch = start_on_gpu(config.runtime.device, timeout_s=config.runtime.timeout_s)
    set_up_logging(launch.rank)
    rows = []
    meter = Meter(config.steps, config.profile, Stamps(), read_bytes_per_us())
    meter.stamps.wrap()
    hardware = find_hardware(HelixConfig(runtime=config.runtime), launch.device)
    for kvp, tpa in config.layouts:
        room = max((context + 8192) * batch for context, batch in config.cases)
        settings = HelixConfig(
            model=replace(
                with_weights(config.model, config.weights),
                max_position=max(context for context, _ in config.cases) + 8192,
            ),
            parallel=ParallelConfig(kvp=kvp, tpa=tpa, ep=config.ep),
            cache=CacheConfig(
                block_size=config.block_size,
                num_pages=room // config.block_size // kvp + 64,
                dtype=config.cache.dtype,
            ),
            attention=AttentionConfig(split_query_rows=config.split_query_rows),
            scheduler=SchedulerConfig(max_batch=max(batch for _, batch in config.cases)),
            runtime=config.runtime,
        )
        if config.rank is None or config.of is None:
            llm = LLM(settings)
        else:
            llm = LoneRank(settings, rank=config.rank, of=config.of)
        for pages in (*llm.runner.cache.layers, *(llm.runner.decoder.windows or ())):
            fill_pages(pages)
        for context, batch in config.cases:
            row = measure(llm, context, batch, meter)
            slowest = max(gather_values(int(row["TTL ms"] * 1e6))) / 1e6
            rows.append({"kvp": kvp, "tpa": tpa, **row, "TTL ms": slowest, "x floor": slowest / row["floor ms"]})
            said = f"kvp {kvp} x tpa {tpa}, {context} x {batch}: {slowest:.3f} ms"
            if hardware is not None and config.rank is None:  # what is predicted has the collectives in it
                rows[-1]["predicted ms"] = cost_of(llm, hardware).decode(context, batch).us / 1e3
                said += f", predicted {rows[-1]['predicted ms']:.3f} ({hardware.name})"
            cli.say(said)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    columns = list(rows[0])
    values = [[row[name] for name in columns] for row in rows]
    facts: dict[str, Any] = {
        "dtype": "bfloat16",
        "weights": config.weights,
        "cache": config.cache.dtype,
        "ep": config.ep,
    }
    if config.rank is not None:
        facts |= {"rank": f"{config.rank} of {config.of}, alone", "left out": LEFT_OUT}
    report("decode step", columns, values, **facts, read_bytes_per_us=meter.bytes_per_us)
    stop()


if __name__ == "__main__":
    cli.main("bench_decode", BenchDecodeConfig, run)
