"""The quickstart's table: what it says of speculation where there was any."""

from typing import Any

import pytest

from scripts.generate import GenerateConfig
from scripts.quickstart import show

METRICS: dict[str, Any] = {
    "layout": {"kvp": 2, "tpa": 2},
    "world_size": 4,
    "device": "cpu",
    "tokens_per_rank": [5, 4, 5, 4],
    "ttft_ms": {"mean": 12.0},
    "ttl_ms": {"p50": 3.0},
}
DRAFTS = {
    "drafted": 40,
    "accepted": 30,
    "mean_accepted_len": 3.0,
    "tokens_per_target_step": 3.75,
    "steps_per_draft_len": {"0": 2, "4": 10},
}


@pytest.mark.parametrize("speculative", [None, DRAFTS])
def test_the_table_says_what_speculation_was_worth(
    capsys: pytest.CaptureFixture[str], speculative: dict[str, Any] | None
) -> None:
    output = {"prompt_tokens": 8, "token_ids": [1, 2, 3]}
    assert show(GenerateConfig(prompt="x"), {**METRICS, "speculative": speculative}, output, [1, 9, 3]) == 2
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    expected = [
        "drafted tokens, accepted 40, 30",
        "accepted a draft (mean) 3.00",
        "tokens a step of the model 3.75",
        "steps with draft length 0 2",
        "steps with draft length 4 10",
    ]
    assert [line for line in expected if line in lines] == (expected if speculative else [])
