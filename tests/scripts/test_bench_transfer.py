"""The benchmark of KV transfers runs, and ends with one JSON line of its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    *("runtime.device=cpu", "lengths=[256,512]", "layers=4", "sizes_mib=[8]", "repeats=1"),
    *("context=300", "prompts=1", "scheduler.prefill_chunk=128", "cache.num_pages=16"),
]


@pytest.mark.slow
def test_the_benchmark_ends_with_its_figures_as_json(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, "-m", "scripts.bench_transfer", *SMALL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert [row["regions"] for row in figures["prepare"]] == [4 * 8 * 2, 4 * 16 * 2]
    assert [(row["MiB"], row["pages"]) for row in figures["bandwidth"]] == [
        (8, "NIXL, in order"),
        (8, "NIXL, scattered"),
    ]
    (overlap,) = figures["rows"]
    assert overlap["tokens"] == 300 and overlap["after prefill ms"] > 0
    assert min(row["of plain"] for row in figures["bandwidth"]) > 0


def test_one_rank_is_too_few_for_the_benchmark(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "scripts.bench_transfer"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 2
    assert "error: bench_transfer needs at least 2 ranks" in ended.stderr
