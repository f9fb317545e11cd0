"""Kernels are compiled before the first request, several at once, and none afterwards."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
import triton
import triton.language as tl
import yaml

from helix.compile_ahead import compile_ahead
from helix.config import CacheConfig, HelixConfig, ModelConfig, SchedulerConfig, SpeculativeConfig
from helix.llm import LLM
from helix.request import Request
from helix.sampling import SamplingParams
from scripts.cli import CONF

ROOT = Path(__file__).parents[2]


@triton.jit
def _count_to(x, BOUND: tl.constexpr):
    tl.store(x, BOUND)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of kernels as they are compiled."""
    names: list[str] = []
    knobs = triton.knobs.runtime
    before = knobs.jit_post_compile_hook
    knobs.jit_post_compile_hook = lambda **about: names.append(about["fn"].name)
    yield names
    knobs.jit_post_compile_hook = before


def test_without_a_gpu_nothing_is_held_back() -> None:
    with compile_ahead(torch.device("cpu")) as ahead:
        assert not ahead


@pytest.mark.gpu
def test_what_is_compiled_ahead_is_ready_to_be_launched(compiled: list[str]) -> None:
    loaded: list[str] = []
    knobs, before = triton.knobs.runtime, triton.knobs.runtime.kernel_load_end_hook
    knobs.kernel_load_end_hook = lambda module, function, name, *rest: loaded.append(name)
    try:
        x, bound = torch.zeros(1, device="cuda"), Random().randrange(1 << 30)
        with compile_ahead(torch.device("cuda", 0)):
            _count_to[(1,)](x, BOUND=bound)
        torch.cuda.synchronize()
        assert (compiled, loaded, x.item()) == (["_count_to"], ["_count_to"], 0)
        _count_to[(1,)](x, BOUND=bound)
        assert (len(compiled), len(loaded)) == (1, 1)
        assert x.item() == float(torch.tensor(bound, dtype=torch.float32))
    finally:
        knobs.kernel_load_end_hook = before


def draw(rng: Random, vocab: int) -> Request:
    sampling = SamplingParams(max_tokens=rng.randint(1, 20), ignore_eos=True)
    if rng.random() < 0.5:
        sampling.temperature, sampling.seed = 1.0, rng.randrange(100)
        sampling.top_p, sampling.top_k = rng.choice([(1.0, 0), (0.9, 0), (1.0, 20), (0.8, 50)])
    if rng.random() < 0.2:
        sampling.frequency_penalty = 0.5
    if rng.random() < 0.1:
        sampling.logprobs = 3
    if rng.random() < 0.1:
        sampling.min_p, sampling.repetition_penalty = 0.05, 1.1
    if rng.random() < 0.1:
        sampling.logit_bias, sampling.min_tokens = {7: 2.0}, rng.randint(0, sampling.max_tokens)
    if rng.random() < 0.05:
        sampling.prompt_logprobs = rng.randint(0, 3)
    beginning = [1 + i % 50 for i in range(rng.choice([0, 200, 1000]))]
    own = [rng.randrange(vocab) for _ in range(int(2 ** rng.uniform(0, 11)))]
    return Request(prompt_token_ids=beginning + own, sampling=sampling)


@pytest.mark.parametrize(
    ("preset", "method", "requests", "weights"),
    [
        ("deepseek_v2_lite", "none", 200, "bf16"),
        *(
            pytest.param(preset, method, 500, weights, marks=pytest.mark.slow)
            for preset, weights in [
                *product(("glm4_9b_1m", "qwen3_30b_a3b", "deepseek_v2_lite"), ("bf16", "fp8")),
                ("gpt_oss_20b", "bf16"),
            ]
            for method in ("none", "ngram")
        ),
    ],
)
def test_requests_launch_what_the_start_compiled(preset: str, method: str, requests: int, weights: str) -> None:
    """On a GPU that is not there: kernels are noted instead of launched, and nothing is computed."""
    command = [sys.executable, "-m", "tests.helix.late_kernels", preset, method, str(requests), weights]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["start"] > 40 and found["all made"]
    assert found["late"] == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("preset", "method"),
    [
        *product(("glm4_9b_1m", "qwen3_30b_a3b", "deepseek_v2_lite", "gpt_oss_20b"), ("none", "ngram")),
        ("deepseek_r1", "none"),
        ("deepseek_r1", "mtp"),
    ],
)
def test_nothing_is_compiled_while_requests_run(preset: str, method: str, compiled: list[str]) -> None:
    shape = yaml.safe_load((CONF / "model" / f"{preset}.yaml").read_text("utf-8"))["config"] | {"num_hidden_layers": 2}
    if preset == "deepseek_r1":
        shape |= {"first_k_dense_replace": 1, "n_routed_experts": 32}  # all kinds of layers, and less memory
    llm = LLM(
        HelixConfig(
            model=ModelConfig(load="dummy", config=shape, max_position=8192),
            cache=CacheConfig(num_pages=1024),
            scheduler=SchedulerConfig(max_batch=32, prefill_chunk=512),
            speculative=SpeculativeConfig(method=method),
        )
    )
    compiled.clear()
    rng = Random(method)
    llm.generate([draw(rng, llm.spec.vocab_size) for _ in range(500)])
    assert compiled == []
    _count_to[(1,)](torch.zeros(1, device="cuda"), BOUND=rng.randrange(1 << 30))
    assert len(compiled) == 1, "the hook hears of compilations"
