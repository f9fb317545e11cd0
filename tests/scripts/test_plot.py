"""The chart of the benchmarks' results."""

import json
from pathlib import Path

import pytest

from scripts.plot import PARTS, PlotConfig, run

STEP = {"kvp": 2, "tpa": 2, "context": 131072, "batch": 1, "TTL ms": 2.4, "KV floor ms": 0.3, "weights floor ms": 1.0}
RESULTS = [
    {"bench": "decode step", "rows": [STEP | {f"{part} ms": 0.4 for part in PARTS}]},
    {"bench": "attention", "rows": [{"B": 1, "S": 4096, "Q/K": "16/1", "floor us": 0.5, "ours us": 3.7,
                                     "+ merge us": 5.6, "SDPA us": 8.0, "FlashInfer us": None}]},
]  # fmt: skip


def test_every_result_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(result) + "\n" for result in RESULTS), "utf-8")
    run(PlotConfig(results=str(results), output=str(tmp_path / "chart.svg")))
    drawn = (tmp_path / "chart.svg").read_text("utf-8")
    assert drawn.count('id="axes_') == len(RESULTS)
    assert f"drew {tmp_path / 'chart.svg'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is no file; append the JSON lines"),
        ('{"bench": "attention", "rows": []}\nnothing\n', "line 2: no result of a benchmark"),
        ('{"bench": "prefill", "rows": []}\n', "none of decode step, attention"),
    ],
)
def test_bad_results_are_refused(tmp_path: Path, content: str | None, problem: str):
    results = tmp_path / "results.jsonl"
    if content is not None:
        results.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=problem):
        run(PlotConfig(results=str(results), output=str(tmp_path / "chart.svg")))
