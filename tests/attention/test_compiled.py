"""The generic kernels compile for every GPU of the last years, and fit what a program may take there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attention.shared_memory import fit_stages, fit_turn

ROOT = Path(__file__).parents[2]
KIB = 1024
LIMITS = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
CASES = ("decode", "prefill", "latents", "experts")
MORE = (
    "decode-8-bits",
    "latents-8-bits",
    "append",
    "prefill-256",
    "prefill-float32",
    "latents-float32",
    "few-experts",
    "experts-float32",
)


@pytest.mark.parametrize(
    ("arch", "cases"),
    [
        (80, ("decode", "decode-8-bits", "append")),
        (86, CASES),
        (90, ("latents",)),
        (100, ("decode",)),
        (120, ("experts",)),
        *(pytest.param(arch, CASES + MORE, marks=pytest.mark.slow) for arch in LIMITS),
    ],
    ids=str,
)
def test_kernels_fit_the_shared_memory_of_each_gpu(tmp_path: Path, arch: int, cases: tuple[str, ...]) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.attention.compile_kernels", str(arch), str(LIMITS[arch]), *cases]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["case"] for each in compiled} == set(cases)
    assert all(each["bytes"] > 0 for each in compiled)
    assert [each for each in compiled if each["shared"] > LIMITS[arch]] == []


def test_what_does_not_fit_gets_fewer_stages_then_fewer_tokens_then_fewer_rows() -> None:
    sizes = {"least_m": 16, "row_bytes": 256, "token_bytes": 512, "weight_bytes": 2}
    assert fit_turn(16, 128, 3, **sizes, limit=227 * KIB) == (16, 128, 3)
    assert fit_turn(16, 128, 3, **sizes, limit=99 * KIB) == (16, 128, 2)
    assert fit_turn(16, 128, 3, **sizes, limit=48 * KIB) == (16, 64, 2)
    assert fit_turn(128, 64, 2, **sizes, limit=32 * KIB) == (64, 16, 2)
    assert fit_turn(128, 64, 2, **{**sizes, "least_m": 128}, limit=32 * KIB) == (128, 16, 2)
    assert [fit_stages(4, 48 * KIB, limit * KIB) for limit in (227, 163, 99, 16)] == [4, 4, 3, 1]
