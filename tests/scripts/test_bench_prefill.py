"""The prefill benchmark runs on a CPU, computes every prompt anew, and ends with one JSON line."""

import json
from typing import Any

import pytest

from helix.config import ModelConfig, RuntimeConfig
from scripts.bench_prefill import BenchPrefillConfig, run

SHAPE = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip


def small(**changes: Any) -> BenchPrefillConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(load="dummy", config=SHAPE),
        "runtime": RuntimeConfig(device="cpu"),
        "layouts": [[1, 1]],
        "prompts": [24, 100],
        "chunks": [16, 64],
        "block_size": 16,
    }
    return BenchPrefillConfig(**settings | changes)


def test_every_layout_chunk_and_prompt_is_measured(capsys: pytest.CaptureFixture[str]):
    run(small())
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["bench"], line["repeats"]) == ("prefill", 2)
    assert [(row["chunk"], row["prompt"]) for row in line["rows"]] == [(16, 24), (16, 100), (64, 24), (64, 100)]
    assert all(row["TTFT s"] > 0 and row["tokens/s"] > 0 and row["peak MiB"] is None for row in line["rows"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layouts": [[2]]}, "layouts: [2] must be [kvp, tpa], each at least 1"),
        ({"chunks": []}, "chunks = [] must name at least one"),
        ({"prompts": [0, 8]}, "prompts = 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict[str, Any], problem: str):
    with pytest.raises(ValueError) as refused:
        small(**changes)
    assert str(refused.value) == problem
