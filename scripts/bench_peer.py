"""The same work on one GPU through the Python API of Helix or of vLLM: first tokens, a token's time, throughput.

    python -m scripts.bench_peer system=helix model=glm4_9b_1m
    python -m scripts.bench_peer system=vllm model=glm4_9b_1m      # in an environment with vLLM

Random weights by one law in both (so that the experts in use are as many as chance makes), prompts of token ids,
reuse of prefixes on. No two prompts of a run begin alike, so that a first token takes the whole prompt, and how many
different tokens a batch's first ones are shows that its rows are not alike; a token's time (TTL) is taken over prompts
that are cached: the time of ``outputs`` + 1 tokens less that of 1, host work included. Each system runs in a process of
its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helix.config import (
    CacheConfig,
    HelixConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    check_at_least,
    check_choice,
)
from helix.sampling import SamplingParams
from parallel.launch import stop
from scripts import cli
from scripts.dummy_weights import BenchCache, check_weights, with_weights
from scripts.timing import report

SYSTEMS = ("helix", "vllm")
Generate = Callable[[list[list[int]], int], list[int]]
"""Of prompts, and how many tokens each makes: the first tokens."""


@dataclass(frozen=True, slots=True)
class System:
    """A system that has started: how it generates, its vocabulary, how it ends."""

    generate: Generate
    vocab_size: int
    close: Callable[[], None]


@dataclass(kw_only=True, slots=True)
class BenchPeerConfig:
    """What to measure.

    Attributes:
        system: helix or vllm.
        cases: [context, batch] of each case of first tokens and of a token's time.
        throughput: [requests, prompt tokens, output tokens] of each case of throughput.
        chunk: prompt tokens a step.
        max_batch: most sequences of a step.
        outputs: tokens that a token's time is the mean of; 0 takes none.
        repeats: runs of a case, each with fresh prompts; the first may pay for what is done once.
        weights: bf16, or fp8: blocks of 128 x 128 in 8 bits.
        cache: its dtype, as ``cache.dtype`` of a run.
        peer: further arguments of ``vllm.LLM``.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    system: str = "helix"
    cases: list[list[int]] = field(default_factory=lambda: [[4096, 64], [32768, 8], [131072, 1]])
    throughput: list[list[int]] = field(default_factory=lambda: [[256, 1024, 256]])
    chunk: int = 8192
    max_batch: int = 256
    outputs: int = 128
    repeats: int = 2
    weights: str = "bf16"
    cache: BenchCache = field(default_factory=BenchCache)
    peer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("system", self.system, SYSTEMS)
        check_weights(self.weights, self.model)
        if self.system == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ValueError("system = vllm needs vLLM, in an environment of its own: pip install vllm")
        for name, size in (("cases", 2), ("throughput", 3)):
            for case in getattr(self, name):
                if len(case) != size or min(case) < 1:
                    raise ValueError(f"{name}: {case} must be {size} numbers from 1 on")
        if not self.cases and not self.throughput:
            raise ValueError("cases = [] and throughput = [] must not both be empty")
        if self.peer and self.system != "vllm":
            raise ValueError(f"peer = {self.peer} is for system = vllm")
        for name in ("chunk", "max_batch", "repeats"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("outputs", self.outputs, 0)

    def longest(self) -> int:
        """Return the most tokens of a sequence, rounded up to whole pages and a few more."""
        lengths = [context + self.outputs + 1 for context, _ in self.cases]
        lengths += [inputs + outputs for _, inputs, outputs in self.throughput]
        return -(-max(lengths) // 64) * 64 + 64


def start_helix(config: BenchPeerConfig) -> System:
    """Start Helix."""
    from helix.llm import LLM

    llm = LLM(
        HelixConfig(
            model=replace(with_weights(config.model, config.weights), max_position=config.longest()),
            cache=CacheConfig(block_size=64, dtype=config.cache.dtype),
            scheduler=SchedulerConfig(max_batch=config.max_batch, prefill_chunk=config.chunk),
            runtime=config.runtime,
        )
    )

    def generate(prompts: list[list[int]], outputs: int) -> list[int]:
        answers = llm.generate(prompts, SamplingParams(max_tokens=outputs, ignore_eos=True))
        for answer in answers:
            if answer.error is not None:
                raise ValueError(answer.error)
        return [answer.token_ids[0] for answer in answers]

    return System(generate, llm.spec.vocab_size, stop)


def fill_by_law(model: torch.nn.Module) -> None:
    """Fill vLLM's weights as Helix fills its own: norms 1, embeddings of standard deviation 1, biases 0.02, matrices
    1 / sqrt(columns); of 8 bits, values of 64 and one scale.

    What vLLM makes of a weight of latents, a view of it or a copy, is made again, in the memory that graphs read.
    """
    weights = {name: weight for name, weight in model.named_parameters() if not name.endswith(("W_UK_T", "W_UV"))}
    for name, weight in weights.items():
        scaled = weights.get(name.removesuffix("_inv").removesuffix("_scale")) if "scale" in name else None
        if weight.dtype == torch.float8_e4m3fn:
            for some in weight.data.split(max(1, (1 << 26) // weight[0].numel())):
                some.copy_(torch.empty(some.shape, device=some.device).normal_(0, 64))
        elif scaled is not None:
            weight.data.fill_(scaled.shape[-1] ** -0.5 / 64)
        elif "norm" in name:
            weight.data.fill_(1)
        elif "embed" in name or name.endswith("bias"):
            weight.data.normal_(0, 1 if "embed" in name else 0.02)
        elif weight.dim() > 1:
            weight.data.normal_(0, weight.shape[-1] ** -0.5)
    module: Any
    for module in model.modules():
        if hasattr(module, "W_UK_T"):
            module.process_weights_after_loading(module.W_UK_T.dtype)


def start_vllm(config: BenchPeerConfig) -> System:
    """Start vLLM on a folder that holds a config alone."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # weights are filled by a function in its process
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this one has threads
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import LLM  # type: ignore[import-not-found]
    from vllm import SamplingParams as PeerParams

    model = with_weights(config.model, config.weights)
    shape = dict(model.config or json.loads((Path(model.path) / "config.json").read_text()))
    shape.setdefault("architectures", [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[shape["model_type"]]])
    shape |= {"torch_dtype": "bfloat16"}
    folder = Path(tempfile.mkdtemp(prefix="helix-peer-"))
    (folder / "config.json").write_text(json.dumps(shape))
    given = dict(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", block_size=64,
        max_model_len=config.longest(), max_num_batched_tokens=config.chunk, max_num_seqs=config.max_batch,
        enable_prefix_caching=True, disable_log_stats=True, kv_cache_dtype=config.cache.dtype,
    )  # fmt: skip
    llm = LLM(**given | config.peer)
    llm.apply_model(fill_by_law)

    def generate(prompts: list[list[int]], outputs: int) -> list[int]:
        exactly = PeerParams(temperature=0, max_tokens=outputs, ignore_eos=True, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], exactly, use_tqdm=False)
        return [answer.outputs[0].token_ids[0] for answer in answers]

    return System(generate, shape["vocab_size"], llm.llm_engine.engine_core.shutdown)


def run(config: BenchPeerConfig) -> None:
    """Run the benchmark; it prints one line a case and a table."""
    began = time.perf_counter()
    system = (start_helix if config.system == "helix" else start_vllm)(config)
    cli.say(f"{config.system}: {time.perf_counter() - began:.1f} s to start")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []

    def fresh(count: int, length: int) -> list[list[int]]:
        return rng.integers(0, system.vocab_size, (count, length)).tolist()

    def timed(prompts: list[list[int]], outputs: int) -> tuple[float, list[int]]:
        """Return what the prompts take to their last token, in seconds, and their first ones."""
        began = time.perf_counter()
        first = system.generate(prompts, outputs)
        return time.perf_counter() - began, first

    def add(case: str, times: list[float], ttl_ms: float | None, rate: int | None) -> None:
        rows.append({"case": case, "first s": times[0], "again s": min(times[1:] or times)})
        rows[-1] |= {"TTL ms": ttl_ms, "tokens/s": rate}

    for context, batch in config.cases:
        times = []
        for _ in range(config.repeats):
            prompts = fresh(batch, context)
            took, first = timed(prompts, 1)
            times.append(took)
        said = f"{context} x {batch}: first tokens {[round(each, 2) for each in times]} s"
        said += f" ({len(set(first))} of {batch} different)"
        ttl_ms = None
        if config.outputs:
            spans = [timed(prompts, 1 + config.outputs)[0] - timed(prompts, 1)[0] for _ in range(2)]
            ttl_ms = min(spans) / config.outputs * 1e3
            said += f", TTL {ttl_ms:.3f} ms"
        add(f"{context} x {batch}", times, ttl_ms, None)
        cli.say(said)
    for requests, inputs, outputs in config.throughput:
        times = [timed(fresh(requests, inputs), outputs)[0] for _ in range(config.repeats)]
        rate = round(requests * outputs / min(times))
        add(f"{requests} x {inputs} x {outputs}", times, None, rate)
        cli.say(f"{requests} x {inputs} in x {outputs} out: {[round(each, 2) for each in times]} s, {rate} tokens/s")
    system.close()
    facts = {"system": config.system, "chunk": config.chunk, "weights": config.weights, "cache": config.cache.dtype}
    report("one GPU", list(rows[0]), [list(row.values()) for row in rows], **facts)


if __name__ == "__main__":
    cli.main("bench_peer", BenchPeerConfig, run)
