"""Time to first token of a long prompt, and the memory that prefill takes, by layout, prompt length and chunk.

    torchrun --standalone --nproc-per-node 4 -m scripts.bench_prefill model=glm4_9b_1m \
        layouts='[[2,2],[1,4],[4,1]]' prompts='[32768,131072]' chunks='[2048,8192]'

Prompts are random and never reused. Layouts are [kvp, tpa]; a chunk is scheduler.prefill_chunk. Peak memory is what a
rank's device held at most beyond weights and cache: it grows with the chunk, not with the prompt. The slowest and the
largest rank count. A prompt of the shortest length runs first, unmeasured, for each layout and chunk.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, field, replace
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
    check_at_least,
)
from helix.llm import LLM
from helix.predicted import cost_of
from helix.prediction import find_hardware
from helix.sampling import SamplingParams
from parallel.launch import gather_values, set_up_logging, start, stop
from scripts import cli
from scripts.dummy_weights import BenchCache, check_pairs, check_weights, with_weights
from scripts.timing import report


@dataclass(kw_only=True, slots=True)
class BenchPrefillConfig:
    """What to measure.

    Attributes:
        layouts: [kvp, tpa] of each layout.
        prompts: lengths of prompts, in tokens.
        chunks: prompt tokens a step.
        block_size: tokens a page.
        repeats: runs to take the median of.
        weights: bf16, or fp8: blocks of 128 x 128 in 8 bits; or fp8_head: the output head as well.
        cache: its dtype, as ``cache.dtype`` of a run.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    layouts: list[list[int]] = field(default_factory=lambda: [[2, 2], [1, 4], [4, 1]])
    prompts: list[int] = field(default_factory=lambda: [32768, 131072])
    chunks: list[int] = field(default_factory=lambda: [2048, 8192])
    block_size: int = 64
    repeats: int = 2
    weights: str = "bf16"
    cache: BenchCache = field(default_factory=BenchCache)

    def __post_init__(self) -> None:
        check_weights(self.weights, self.model)
        for name in ("layouts", "prompts", "chunks"):
            if not getattr(self, name):
                raise ValueError(f"{name} = [] must name at least one")
        check_pairs("layouts", self.layouts, "[kvp, tpa]")
        for name, value in [("prompts", min(self.prompts)), ("chunks", min(self.chunks)), ("repeats", self.repeats)]:
            check_at_least(name, value, 1)

    def helix(self, kvp: int, tpa: int, chunk: int) -> HelixConfig:
        """Return the settings of one layout and chunk: room for the longest prompt, and no reuse."""
        longest = max(self.prompts) + self.block_size
        return HelixConfig(
            model=replace(with_weights(self.model, self.weights), max_position=longest),
            parallel=ParallelConfig(kvp=kvp, tpa=tpa),
            cache=CacheConfig(
                block_size=self.block_size,
                num_pages=-(-longest // (self.block_size * kvp)) + 1,
                dtype=self.cache.dtype,
                reuse=False,
            ),
            scheduler=SchedulerConfig(max_batch=1, prefill_chunk=chunk),
            runtime=self.runtime,
        )


def prefill(llm: LLM, prompt_len: int) -> tuple[float, int | None]:
    """Run a random prompt to its first token: TTFT in seconds, of the slowest rank, and peak bytes, of the largest.

    Collective over the world. Bytes are those beyond what was allocated before; None without a GPU.
    """
    on_gpu = llm.launch.device.type == "cuda"
    prompt = np.random.default_rng(prompt_len).integers(0, llm.spec.vocab_size, prompt_len).tolist()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    [output] = llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
    if output.error is not None:
        raise ValueError(output.error)
    assert output.cached_tokens == 0 and len(output.token_ids) == 1
    ttft_s = max(gather_values(int(llm.metrics.ttft_s.mean_s() * 1e9))) / 1e9
    peak = max(gather_values(torch.cuda.max_memory_allocated() - before)) if on_gpu else None
    return ttft_s, peak


def measure(llm: LLM, prompt_len: int, repeats: int) -> dict[str, Any]:
    """Return the figures of one prompt length."""
    times, peaks = zip(*(prefill(llm, prompt_len) for _ in range(repeats)), strict=True)
    ttft_s = statistics.median(times)
    return {
        "prompt": prompt_len,
        "TTFT s": ttft_s,
        "spread s": max(times) - min(times),
        "tokens/s": round(prompt_len / ttft_s),
        "peak MiB": None if peaks[0] is None else max(peaks) / 2**20,
    }


def run(config: BenchPrefillConfig) -> None:
    """Run the benchmark on this rank."""
    launch = start(config.runtime.device, timeout_s=config.runtime.timeout_s)
    set_up_logging(launch.rank)
    rows = []
    hardware = find_hardware(HelixConfig(runtime=config.runtime), launch.device)
    for kvp, tpa in config.layouts:
        for chunk in config.chunks:
            llm = LLM(config.helix(kvp, tpa, chunk))
            prefill(llm, min(config.prompts))
            for prompt_len in config.prompts:
                row = {"kvp": kvp, "tpa": tpa, "chunk": chunk, **measure(llm, prompt_len, config.repeats)}
                rows.append(row)
                said = f"kvp {kvp} x tpa {tpa}, chunks of {chunk}, {prompt_len} tokens: {row['TTFT s']:.3f} s"
                if hardware is not None:
                    row["predicted s"] = cost_of(llm, hardware).prefill(prompt_len).us / 1e6
                    said += f", predicted {row['predicted s']:.3f} ({hardware.name})"
                cli.say(said)
            del llm
            gc.collect()
            if launch.device.type == "cuda":
                torch.cuda.empty_cache()
    report(
        "prefill",
        list(rows[0]),
        [list(row.values()) for row in rows],
        repeats=config.repeats,
        weights=config.weights,
        cache=config.cache.dtype,
    )
    stop()


if __name__ == "__main__":
    cli.main("bench_prefill", BenchPrefillConfig, run)
