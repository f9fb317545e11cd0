"""The comparison's own half runs on CPUs, and says what it cannot measure."""

import json
from typing import Any

import pytest

from helix.config import ModelConfig
from scripts.bench_peer import BenchPeerConfig, run
from tests.scripts.test_bench_prefill import SHAPE


def test_first_tokens_a_tokens_time_and_throughput_are_measured(capfd: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(config=SHAPE, load="dummy", dtype="float32")
    run(BenchPeerConfig(model=model, cases=[[70, 2]], throughput=[[3, 20, 4]], outputs=4, max_batch=4))
    line = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    case, throughput = line["rows"]
    assert (line["system"], case["case"], throughput["case"]) == ("helix", "70 x 2", "3 x 20 x 4")
    assert 0 < case["TTL ms"] < 1e3 * case["again s"] and throughput["tokens/s"] > 0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"system": "other"}, "system = "),
        ({"system": "vllm"}, "system = vllm needs vLLM"),
        ({"cases": [[4096]]}, r"cases: \[4096\] must be 2 numbers"),
        ({"cases": [], "throughput": []}, "must not both be empty"),
        ({"repeats": 0}, "repeats = 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BenchPeerConfig(**settings)
