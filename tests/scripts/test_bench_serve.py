"""The benchmark of the server runs the same requests both ways, and ends with one JSON line."""

import json

import pytest

from helix.config import CacheConfig, ModelConfig, RuntimeConfig
from scripts.bench_serve import BenchServeConfig, run
from tests.scripts.test_bench_prefill import SHAPE


def test_both_ways_make_all_tokens(capfd: pytest.CaptureFixture[str]) -> None:
    run(
        BenchServeConfig(
            model=ModelConfig(load="dummy", config=SHAPE),
            cache=CacheConfig(num_pages=32, block_size=16),
            runtime=RuntimeConfig(device="cpu"),
            batches=[2],
            prompt_len=20,
            outputs=6,
            rounds=1,
        )
    )
    rows = json.loads(capfd.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["batch"], row["way"]) for row in rows] == [(2, "alone"), (2, "served")]
    assert all(0 <= row["TTL ms p50"] <= row["TTL ms p99"] and row["tokens/s"] > 0 for row in rows)
