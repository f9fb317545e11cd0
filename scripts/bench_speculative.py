"""TTL per output token with speculation against none, for fixed draft lengths and for a schedule, by batch size.

    torchrun --standalone --nproc-per-node 1 -m scripts.bench_speculative model=glm4_9b_1m
    torchrun --standalone --nproc-per-node 1 -m scripts.bench_speculative model=deepseek_v3_4_layers drafter=mtp

What speculation gains depends on how often drafts are right, so the drafter is given: it is right with probability p,
each position by itself, and costs nothing. The model counts (its output head is made from its embedding, so that the
token after t is t + 1 by a wide margin whatever the context), which makes the right draft known and the tokens
independent of rounding; its work is that of any weights. Steps run through the engine, host work included, over prompts
that were computed; every figure is the median of ``repeats`` runs, which take turns.

With ``drafter=mtp`` the model's layer that predicts one token further drafts (with ``eagle3`` that of the folder
``head``), on the device and on the host, and what it drafted is replaced by what is right with probability p: the work
is its own, the acceptance is given. Lines named "k given" have drafts that cost nothing beside it, and "none" is the
model without that layer.

Without a ``schedule`` the best fixed length of each batch size makes one, which is then measured as such.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence as Many
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import product
from random import Random
from typing import Any

import numpy as np
import torch

from helix.config import (
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from helix.graphs import buckets_up_to
from helix.llm import LLM
from helix.request import Sequence
from helix.runner import Runner
from helix.sampling import SamplingParams
from helix.speculative.next_layer import Launched, NextLayerSpeculator
from helix.speculative.schedule import DraftLenSchedule
from helix.speculative.speculator import Speculator
from helix.upload import upload
from parallel.launch import gather_values, set_up_logging, start
from scripts import cli
from scripts.timing import report

NONE, SCHEDULE = "none", "schedule"
GIVEN = "given"
WARM_UP = 8  # tokens of each sequence before the clock starts


@dataclass(kw_only=True, slots=True)
class BenchSpeculativeConfig:
    """What to measure.

    Attributes:
        drafter: given, which costs nothing, or mtp or eagle3, whose work is done and whose drafts are replaced by given
            ones.
        head: the folder of the EAGLE-3 head.
        context: prompt tokens of each sequence.
        batches: sequences that decode together.
        lengths: fixed draft lengths.
        acceptance: how often a draft is right.
        schedule: batch size -> draft length; None takes the best fixed lengths of this run.
        tokens: output tokens of each sequence that are timed, on average.
        repeats: runs of each case.
        block_size: tokens a page.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    drafter: str = GIVEN
    head: str = ""
    context: int = 8192
    batches: list[int] = field(default_factory=lambda: [1, 4, 8, 32, 64])
    lengths: list[int] = field(default_factory=lambda: [1, 2, 4])
    acceptance: list[float] = field(default_factory=lambda: [0.8])
    schedule: Any = None
    tokens: int = 512
    repeats: int = 3
    block_size: int = 64


class RecordedNextLayer(NextLayerSpeculator):
    """Drafts by the layer that predicts one token further, and then proposes what another drafter does."""

    def __init__(self, schedule: DraftLenSchedule, runner: Runner, drafter: CountingDrafter) -> None:
        super().__init__(schedule, runner)
        self._drafter = drafter
        self._recorded: dict[Sequence, list[int]] = {}

    def _launch(self, rooms: dict[Sequence, int]) -> list[Launched]:
        launched, states = super()._launch(rooms), self._runner.next_states
        assert states is not None
        seqs = [seq for seq, room in rooms.items() if room]
        self._recorded = dict(zip(seqs, self._drafter.draft(seqs, [rooms[seq] for seq in seqs]), strict=True))
        places = [
            (1 + ahead, seq.batch_slot, token)
            for seq, drafts in self._recorded.items()
            for ahead, token in enumerate(drafts)
        ]
        sent = upload({"places": np.array(places, np.int64).reshape(-1, 3)}, states.chosen.device)["places"]
        states.chosen[sent[:, 0], sent[:, 1]] = sent[:, 2]
        return launched

    def _read(self) -> dict[Sequence, list[int]]:
        super()._read()
        return self._recorded


class CountingDrafter:
    """Knows that the next token is the last one plus 1, and says so with probability p at each position.

    Which positions it errs at is a function of the sequence and the position alone, so it is the same for all lengths.

    Args:
        p: how often a draft is right.
        vocab_size: tokens count up to it, and start anew.
        batch, max_len: the most sequences, and their longest length in tokens.
    """

    def __init__(self, p: float, vocab_size: int, *, batch: int, max_len: int) -> None:
        rng = Random(0)
        self._errors = [[rng.random() >= p for _ in range(max_len)] for _ in range(batch)]
        self._vocab_size = vocab_size

    def draft(self, seqs: Many[Sequence], limits: Many[int]) -> list[list[int]]:
        """Count on from each sequence's last token; an error is one too many."""
        drafts = []
        for seq, limit in zip(seqs, limits, strict=True):
            at, last = len(seq.token_ids), seq.token_ids[-1]
            errors = self._errors[seq.index][at : at + limit]
            drafts.append([(last + 1 + step + errors[step]) % self._vocab_size for step in range(limit)])
        return drafts

    def drop(self, seq: Sequence) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Way:
    """One way to decode: what drafts, if anything does, and what runs the steps."""

    runner: Runner
    speculator: Speculator | None


@dataclass(frozen=True)
class Timing:
    """What one run took, per output token of a sequence, and what its steps held."""

    ttl_us: float
    tokens_per_step: float
    acceptance: float
    padding_rows: int


def make_llm(config: BenchSpeculativeConfig) -> LLM:
    """Return an LLM that counts, with graphs for every batch size and length that is measured."""
    batch, longest = max(config.batches), max_len(config)
    blocks = -(-longest // config.block_size) + 1
    llm = LLM(
        HelixConfig(
            model=replace(config.model, max_position=longest),
            parallel=config.parallel,
            cache=CacheConfig(block_size=config.block_size, num_pages=batch * blocks + 64),
            scheduler=SchedulerConfig(max_batch=batch, prefill_chunk=8192),
            speculative=SpeculativeConfig(
                method="ngram" if config.drafter == GIVEN else config.drafter,
                path=config.head,
                max_draft_len=max(config.lengths),
            ),
            runtime=replace(config.runtime, graphs=False),
        )
    )
    top, (begin, end) = llm.runner.decoder.top, llm.runner.decoder.part.vocab
    before = (torch.arange(begin, end, device=llm.launch.device) - 1) % llm.spec.vocab_size
    top["lm_head"].copy_(top["embedding"][before])
    top["embedding"] *= 64  # so that what layers add never outweighs the token itself
    if llm.runner.faults is not None:
        buckets = buckets_up_to(batch)
        used = {next(bucket for bucket in buckets if bucket >= size) for size in config.batches}
        llm.runner.capture(product(sorted(used), config.lengths))
        if config.drafter != GIVEN:
            llm.runner.prepare_drafts(max(config.lengths), captured=True)
    return llm


def without_next_layer(llm: LLM) -> Runner:
    """Return a runner of the same model and pages that knows nothing of the layer that predicts one token further."""
    runner, decoder = llm.runner, copy(llm.runner.decoder)
    decoder.next, decoder.taps = None, ()
    plain = Runner(
        decoder, llm.exchange, runner.cache, llm.placement, max_batch=runner.max_batch, max_len=llm.spec.max_position,
        share_qkv_rows=llm.config.attention.share_qkv_rows, expand_rows=llm.config.attention.expand_rows,
        faults=runner.faults, sampler=runner.sampler,
    )  # fmt: skip
    if runner.faults is not None:
        plain.capture()
    return plain


def max_len(config: BenchSpeculativeConfig) -> int:
    """Return the tokens that a sequence may come to: its prompt, and at most twice what is timed and warms up."""
    return config.context + 2 * (config.tokens + WARM_UP) + 64


def prompts(config: BenchSpeculativeConfig, batch: int, vocab_size: int) -> list[list[int]]:
    """Return prompts that have nothing in common."""
    return [Random(index).choices(range(vocab_size), k=config.context) for index in range(batch)]


def measure(llm: LLM, asked: list[list[int]], tokens: int, way: Way) -> Timing:
    """Time so many output tokens of each sequence, on average, while all of them decode. Collective over the world.

    Raises:
        ValueError: when the model did not count.
    """
    engine = llm.engine
    engine.speculator, engine.runner = way.speculator, way.runner
    stream = llm.stream(asked, SamplingParams(max_tokens=2 * (tokens + WARM_UP), ignore_eos=True))
    made = [0] * len(asked)
    while min(made) < WARM_UP:
        made[next(stream).index] += 1
    metrics = llm.metrics
    before, steps, padding = metrics.decode_tokens, metrics.num_steps, metrics.padding_rows
    began = time.perf_counter()
    while metrics.decode_tokens - before < tokens * len(asked):
        engine.step()
    elapsed = time.perf_counter() - began
    timed = metrics.decode_tokens - before
    for seq in engine.scheduler.running:
        first = seq.token_ids[seq.prompt_len - 1] + 1
        if seq.output_ids != [(first + i) % llm.spec.vocab_size for i in range(len(seq.output_ids))]:
            raise ValueError(f"sequence {seq.index} did not count: the drafts' acceptance is not what was asked for")
    counters = metrics.speculative
    stream.close()
    return Timing(
        ttl_us=max(gather_values(int(elapsed * 1e9))) / 1e3 * len(asked) / timed,
        tokens_per_step=timed / len(asked) / (metrics.num_steps - steps),
        acceptance=counters.accepted / counters.drafted if counters is not None and counters.drafted else 0.0,
        padding_rows=metrics.padding_rows - padding,
    )


def run_all(llm: LLM, plain: Runner, config: BenchSpeculativeConfig, p: float) -> list[dict[str, Any]]:
    """Return the table of one acceptance rate; ``plain`` runs what does not draft.

    A first round warms up, and makes the schedule where none is given.
    """
    vocab, longest = llm.spec.vocab_size, max_len(config)
    drafter = CountingDrafter(p, vocab, batch=max(config.batches), max_len=longest)
    asked = prompts(config, max(config.batches), vocab)
    fixed = ways(llm, plain, config, drafter)
    timings: dict[tuple[int, str], list[Timing]] = defaultdict(list)

    def round_of(ways: dict[str, Way]) -> None:
        for batch, (name, way) in product(config.batches, ways.items()):
            timing = measure(llm, asked[:batch], config.tokens, way)
            timings[batch, name].append(timing)
            cli.say(f"p {p}, batch {batch}, draft length {name}: {timing.ttl_us / 1e3:.3f} ms a token")

    round_of(fixed)
    real = [NONE, *map(str, config.lengths)]
    best = {batch: min(real, key=lambda name: timings[batch, name][0].ttl_us) for batch in config.batches}
    lengths = config.schedule or {batch: 0 if best[batch] == NONE else int(best[batch]) for batch in config.batches}
    timings.clear()
    schedule = DraftLenSchedule(max(config.lengths), lengths)
    for _ in range(config.repeats):
        round_of({**fixed, SCHEDULE: Way(llm.runner, speculator_of(llm, config, schedule, drafter))})
    return [row_of(p, batch, name, schedule, timings) for batch, name in timings]


def speculator_of(
    llm: LLM, config: BenchSpeculativeConfig, schedule: DraftLenSchedule, drafter: CountingDrafter
) -> Speculator:
    """Return what drafts by a schedule."""
    return (
        Speculator(schedule, drafter) if config.drafter == GIVEN else RecordedNextLayer(schedule, llm.runner, drafter)
    )


def ways(llm: LLM, plain: Runner, config: BenchSpeculativeConfig, drafter: CountingDrafter) -> dict[str, Way]:
    """Return the ways of fixed draft lengths, by name."""
    schedules = {str(k): DraftLenSchedule(k) for k in config.lengths}
    found = {NONE: Way(plain, None)}
    found |= {name: Way(llm.runner, speculator_of(llm, config, each, drafter)) for name, each in schedules.items()}
    if config.drafter != GIVEN:
        found |= {f"{name} {GIVEN}": Way(llm.runner, Speculator(each, drafter)) for name, each in schedules.items()}
    return found


def row_of(
    p: float, batch: int, name: str, schedule: DraftLenSchedule, timings: dict[tuple[int, str], list[Timing]]
) -> dict[str, Any]:
    """Return one line of the table."""
    runs = timings[batch, name]
    times = [each.ttl_us for each in runs]
    return {
        "p": p,
        "batch": batch,
        "draft length": f"{schedule.draft_len(batch)} by schedule" if name == SCHEDULE else name,
        "TTL ms": statistics.median(times) / 1e3,
        "spread ms": (max(times) - min(times)) / 1e3,
        "x none": statistics.median(each.ttl_us for each in timings[batch, NONE]) / statistics.median(times),
        "tokens a step": runs[0].tokens_per_step,
        "accepted": runs[0].acceptance,
        "padding rows": sum(each.padding_rows for each in runs),
    }


def targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that a run is judged by: each of the worst case."""
    rows = [row for row in rows if GIVEN not in row["draft length"]]
    by_schedule = [row for row in rows if "schedule" in row["draft length"]]
    best = {
        (row["p"], row["batch"]): min(
            each["TTL ms"] for each in rows if each not in by_schedule and each["batch"] == row["batch"]
            and each["p"] == row["p"]
        )
        for row in by_schedule
    }  # fmt: skip
    single = [row["x none"] for row in rows if (row["p"], row["batch"], row["draft length"]) == (0.8, 1, "4")]
    mtp = [row["x none"] for row in by_schedule if (row["p"], row["batch"]) == (0.8, 1)]
    return {
        "x none at p 0.8, batch 1, draft length 4 (target 2.6 where drafts cost nothing)": single[0]
        if single
        else None,
        "x none at p 0.8, batch 1, by schedule (target 1.5 with drafts of its own)": mtp[0] if mtp else None,
        "schedule over best fixed, worst (target 1.03)": max(
            row["TTL ms"] / best[row["p"], row["batch"]] for row in by_schedule
        ),
        "schedule x none, worst (target 0.99)": min(row["x none"] for row in by_schedule),
        "padding rows (target 0)": sum(row["padding rows"] for row in rows),
    }


def run(config: BenchSpeculativeConfig) -> None:
    """Run the benchmark on this rank."""
    launch = start(config.runtime.device, timeout_s=config.runtime.timeout_s)
    set_up_logging(launch.rank)
    llm = make_llm(config)
    llm.generate(prompts(config, max(config.batches), llm.spec.vocab_size), SamplingParams(max_tokens=1))  # stay cached
    plain = llm.runner if config.drafter == GIVEN else without_next_layer(llm)
    rows = [row for p in config.acceptance for row in run_all(llm, plain, config, p)]
    columns = list(rows[0])
    layout = {"kvp": llm.layout.kvp, "tpa": llm.layout.tpa}
    report(
        "speculative decoding",
        columns,
        [[row[name] for name in columns] for row in rows],
        **{
            "drafter": config.drafter,
            "layout": layout,
            "context": config.context,
            "tokens": config.tokens,
            "repeats": config.repeats,
        },
        dtype=str(llm.dtype).removeprefix("torch."),
        targets=targets(rows),
    )
    plain.release_graphs()
    llm.close()


if __name__ == "__main__":
    cli.main("bench_speculative", BenchSpeculativeConfig, run)
