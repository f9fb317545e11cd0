"""Sweeps: what is refused, what is done already, what an interruption leaves."""

import json

from scripts.sweep import Case, Sweep, SweepConfig, cases_of, divided

ARGUMENTS = ["model=glm4_9b_1m", "parallel.kvp=1,2,8", "parallel.tpa=1,8"]


def config(folder, **settings) -> SweepConfig:
    return SweepConfig(output=str(folder), mode="plan", batch="1,8", context="128K", gpus="8", **settings)


def test_a_predicted_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    cases = cases_of(config(tmp_path), ARGUMENTS)
    assert len(cases) == 3 * 2 * 2
    points = Sweep(config(tmp_path), cases).run()
    assert {(p["kvp"], p["tpa"]) for p in points if p["status"] == "ok"} == {(1, 1), (1, 8), (2, 1), (8, 1)}
    assert all("exceeds the model's 2 KV heads" in p["why"] for p in points if (p["kvp"], p["tpa"]) == (2, 8))
    file = tmp_path / "points.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])  # cut within a line
    again: list[Case] = []
    run = Sweep._point
    monkeypatch.setattr(Sweep, "_point", lambda sweep, case: again.append(case) or run(sweep, case))
    assert Sweep(config(tmp_path), cases).run() == points
    assert again == cases[5:]
    assert [json.loads(line) for line in file.read_text().splitlines()] == points


def test_the_sweeps_own_keys_are_told_from_those_of_its_runs() -> None:
    own, swept = divided(["batch=1", "parallel.kvp=1,2", "hardware=h200", "cache.num_pages=8", "--help"])
    assert own == ["batch=1", "hardware=h200", "--help"]
    assert swept == ["parallel.kvp=1,2", "cache.num_pages=8"]
