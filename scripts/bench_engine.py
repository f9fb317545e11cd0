"""What users run: requests through the engine's own door, at several batches, greedy and sampled, first use and warm.

    torchrun --standalone --nproc-per-node 4 -m scripts.bench_engine model=glm4_9b_1m \
        batches='[1,8,64]' prompts='[1024,131072]' outputs=256 requests=64

A case is a batch and a sampling: ``requests`` prompts of random tokens, or a batch of them where that is more, lengths
drawn evenly on a logarithmic scale between the two of ``prompts``, at most a batch of them on their way at once. With
``rate`` they arrive as a Poisson process, and one that finds the batch full waits, which its TTFT counts. Every case
runs twice with the same lengths and fresh tokens: the first use, which pays for whatever is done once, and warm. Times
are rank 0's: TTFT is from a request's arrival to its first token, TTL from one token of a request to its next.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from helix.commands import Close, encode
from helix.config import (
    CacheConfig,
    HelixConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
    check_at_least,
    check_choice,
)
from helix.llm import LLM
from helix.request import StreamEvent
from helix.sampling import SamplingParams
from parallel.launch import set_up_logging
from scripts import cli
from scripts.dummy_weights import check_weights, with_weights
from scripts.pareto import check_picture
from scripts.timing import report
from scripts.token_times import figures_of

SAMPLINGS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=1.0),
    "nucleus": SamplingParams(temperature=1.0, top_p=0.95),
    "penalties": SamplingParams(frequency_penalty=0.1, repetition_penalty=1.1),
}


@dataclass(kw_only=True, slots=True)
class BenchEngineConfig:
    """What to measure.

    Attributes:
        batches: most sequences on their way at once, of each case.
        samplings: greedy, temperature (1), nucleus (temperature 1, top-p 0.95) or penalties, of each case.
        requests: of a case; where its batch is larger, as many as that holds.
        prompts: the shortest and the longest prompt, in tokens.
        outputs: tokens a request makes.
        rate: requests that arrive a second, at random times; null: one arrives when another ends.
        weights: bf16, or fp8: blocks of 128 x 128 in 8 bits; or fp8_head: the output head as well.
        seed: of lengths, tokens and arrivals.
        plot: a picture of TTL over time, with the prompts that arrive, of the last case.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    batches: list[int] = field(default_factory=lambda: [1, 8, 64])
    samplings: list[str] = field(default_factory=lambda: ["greedy", "nucleus"])
    requests: int = 64
    prompts: list[int] = field(default_factory=lambda: [1024, 16384])
    outputs: int = 256
    rate: float | None = None
    weights: str = "bf16"
    seed: int = 0
    plot: str | None = None

    def __post_init__(self) -> None:
        check_weights(self.weights, self.model)
        for name in ("batches", "samplings"):
            if not getattr(self, name):
                raise ValueError(f"{name} = [] must name at least one")
        for each in self.samplings:
            check_choice("samplings", each, tuple(SAMPLINGS))
        if len(self.prompts) != 2 or not 1 <= self.prompts[0] <= self.prompts[1]:
            raise ValueError(f"prompts = {self.prompts} must be [shortest, longest], from 1 on")
        for name, value in [("batches", min(self.batches)), ("requests", self.requests), ("outputs", self.outputs)]:
            check_at_least(name, value, 1)
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate = {self.rate} must be above 0; null sends a request whenever another ends")
        if self.plot is not None:
            check_picture("plot", self.plot)

    def helix(self) -> HelixConfig:
        """Return the settings of the runtime; prompts are fresh, so nothing is reused."""
        return HelixConfig(
            model=with_weights(self.model, self.weights),
            parallel=self.parallel,
            cache=replace(self.cache, reuse=False),
            scheduler=replace(self.scheduler, max_batch=max(self.batches)),
            runtime=self.runtime,
        )

    def prompt_lens(self, batch: int) -> list[int]:
        """Return the length of each request's prompt, the same in every case of a batch."""
        low, high = np.log(self.prompts[0]), np.log(self.prompts[1])
        lens = np.exp(np.random.default_rng(self.seed).uniform(low, high, max(self.requests, batch)))
        return [int(length) for length in lens.round()]


class Traffic:
    """Requests that arrive at their times: what the door takes from on rank 0. It closes behind the last one.

    Args:
        prompts: token ids of each request.
        arrivals_s: when each arrives, in seconds after the first ``take``; ascending.
        batch: most that are on their way at once.
    """

    def __init__(
        self, llm: LLM, prompts: Sequence[list[int]], arrivals_s: Sequence[float], sampling: SamplingParams, batch: int
    ) -> None:
        self._preparer, self._sampling, self._batch = llm.preparer, sampling, batch
        self._due = deque(enumerate(zip(prompts, arrivals_s, strict=True)))
        self._num_live, self.began_s = 0, 0.0
        self.arrived_s: list[float] = []
        self.token_s: dict[int, list[float]] = defaultdict(list)
        self.errors: list[str] = []

    def take(self, wait_s: float) -> list[bytes]:
        """Return the requests that are due, where the batch has room; where none is, wait for the next one."""
        self.began_s = self.began_s or time.perf_counter()
        commands: list[bytes] = []
        while self._due and self._num_live < self._batch:
            index, (prompt, due_s) = self._due[0]
            early_s = self.began_s + due_s - time.perf_counter()
            if early_s > 0 and (commands or wait_s == 0):
                break
            if early_s > 0:
                time.sleep(min(early_s, wait_s))
                if early_s > wait_s:
                    break
            self._due.popleft()
            # a request without a time of its own arrives when it is let in
            self.arrived_s.append(self.began_s + due_s if due_s else time.perf_counter())
            commands.append(self._preparer.settle(index, prompt, self._sampling).data)
            self._num_live += 1
        if not self._due and not self._num_live:
            commands.append(encode(Close()))
        return commands

    def note(self, events: Sequence[StreamEvent]) -> None:
        """Note when tokens came, and who is done."""
        now = time.perf_counter()
        for event in events:
            self.token_s[event.index] += [now] * len(event.token_ids)
            if event.output is not None:
                self._num_live -= 1
                if event.output.error is not None:
                    self.errors.append(event.output.error)

    def figures(self) -> dict[str, float]:
        """Return throughput and percentiles of a run that has ended."""
        times = [self.token_s[index] for index in range(len(self.arrived_s))]
        return figures_of(times, self.arrived_s, self.began_s)


def run_case(llm: LLM, config: BenchEngineConfig, batch: int, sampling: str, use: int) -> Traffic:
    """Run a case once, through the door. Collective; the figures are rank 0's."""
    rng = np.random.default_rng([config.seed, use])
    lens = config.prompt_lens(batch)
    prompts = [rng.integers(0, llm.spec.vocab_size, length).tolist() for length in lens]
    gaps = np.zeros(len(lens)) if config.rate is None else rng.exponential(1 / config.rate, len(lens))
    params = replace(SAMPLINGS[sampling], max_tokens=config.outputs, ignore_eos=True, seed=config.seed)
    traffic = Traffic(llm, prompts, np.cumsum(gaps).tolist(), params, batch)
    for events in llm.turns(traffic):
        traffic.note(events)
    if traffic.errors:
        raise ValueError(traffic.errors[0])
    return traffic


def draw(traffic: Traffic, output: str) -> None:
    """Draw each token at its time, by the TTL that came before it, and a line where a prompt arrived."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, arrived in enumerate(traffic.arrived_s):
        axes.axvline(arrived - traffic.began_s, color="#d98032", alpha=0.35, linewidth=0.8)
        times = np.array(traffic.token_s[index])
        axes.plot(times[1:] - traffic.began_s, np.diff(times) * 1e3, ".", color="#1f6fb4", markersize=2)
    axes.set(xlabel="s; a line where a prompt arrives", ylabel="TTL of each token, ms", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=110)


def run(config: BenchEngineConfig) -> None:
    """Run the benchmark on this rank."""
    began = time.perf_counter()
    llm = LLM(config.helix())
    set_up_logging(llm.launch.rank)
    start_s = time.perf_counter() - began
    rows: list[dict[str, Any]] = []
    for batch in config.batches:
        for sampling in config.samplings:
            for use in ("first", "warm"):
                traffic = run_case(llm, config, batch, sampling, 2 * len(rows))
                figures = traffic.figures() if llm.launch.speaks else {}
                rows.append({"batch": batch, "sampling": sampling, "use": use, **figures})
                cli.say(f"batch {batch}, {sampling}, {use}: {figures.get('tokens/s', 0.0):.0f} tokens/s")
    if config.plot is not None and llm.launch.speaks:
        draw(traffic, config.plot)
    layout = {axis: getattr(llm.layout, axis) for axis in ("kvp", "tpa", "tpf", "ep")}
    facts = {"requests": config.requests, "prompts": config.prompts, "outputs": config.outputs, "rate": config.rate}
    columns = list(rows[0])
    values = [list(row.values()) for row in rows]
    report("engine", columns, values, start_s=start_s, weights=config.weights, layout=layout, **facts)
    llm.close()


if __name__ == "__main__":
    cli.main("bench_engine", BenchEngineConfig, run)
