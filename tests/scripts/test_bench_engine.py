"""The engine's benchmark sends requests through the door at their times, and ends with one JSON line."""

import json
from pathlib import Path
from typing import Any

import pytest

from helix.config import CacheConfig, ModelConfig, RuntimeConfig
from scripts.bench_engine import BenchEngineConfig, run
from tests.scripts.test_bench_prefill import SHAPE


def small(**changes: Any) -> BenchEngineConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(load="dummy", config=SHAPE),
        "cache": CacheConfig(num_pages=32, block_size=16),
        "runtime": RuntimeConfig(device="cpu"),
        "requests": 5,
        "prompts": [3, 30],
        "outputs": 4,
    }
    return BenchEngineConfig(**settings | changes)


def test_every_case_runs_twice_and_makes_all_its_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    run(small(batches=[1, 3], samplings=["greedy", "nucleus"], plot=str(tmp_path / "ttl.png")))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["bench"], line["requests"], line["rate"]) == ("engine", 5, None)
    cases = [(row["batch"], row["sampling"], row["use"]) for row in line["rows"]]
    assert cases == [(b, s, u) for b in (1, 3) for s in ("greedy", "nucleus") for u in ("first", "warm")]
    for row in line["rows"]:
        assert 0 < row["TTL ms p50"] <= row["TTL ms p90"] <= row["TTL ms p99"]
        assert row["TTFT ms p50"] > 0 and row["tokens/s"] > 0
    assert (tmp_path / "ttl.png").stat().st_size > 1000


def test_requests_arrive_at_their_rate_and_waiting_counts(capsys: pytest.CaptureFixture[str]):
    run(small(batches=[4], samplings=["greedy"], rate=20.0))
    [_, warm] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    # the five arrivals of this seed take at least 100 ms; nothing makes tokens faster than their requests come
    assert warm["tokens/s"] < 5 * 4 / 0.1


def test_a_batch_is_filled_where_fewer_requests_were_asked_for() -> None:
    config = small()
    assert [len(config.prompt_lens(batch)) for batch in (1, 5, 64)] == [5, 5, 64]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"samplings": ["hot"]}, "samplings = 'hot' must be one of greedy, temperature, nucleus, penalties"),
        ({"prompts": [9, 8]}, "prompts = [9, 8] must be [shortest, longest], from 1 on"),
        ({"rate": 0.0}, "rate = 0.0 must be above 0; null sends a request whenever another ends"),
        ({"batches": [0]}, "batches = 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict[str, Any], problem: str):
    with pytest.raises(ValueError) as refused:
        small(**changes)
    assert str(refused.value) == problem
