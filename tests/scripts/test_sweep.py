"""Sweeps: what is refused, what is done already, what an interruption leaves."""

import json
import signal
import subprocess
import sys
import time

import pytest

from scripts.make_checkpoint import make_checkpoint
from scripts.sweep import Case, Sweep, SweepConfig, cases_of, divided, table

ARGUMENTS = ["model=glm4_9b_1m", "parallel.kvp=1,2,8", "parallel.tpa=1,8"]


def config(folder, **settings) -> SweepConfig:
    return SweepConfig(output=str(folder), mode="plan", batch="1,8", context="128K", gpus="8", **settings)


def test_a_predicted_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch) -> None:
    cases = cases_of(config(tmp_path), ARGUMENTS)
    assert len(cases) == 3 * 2 * 2
    points = Sweep(config(tmp_path), cases).run()
    assert {(p["kvp"], p["tpa"]) for p in points if p["status"] == "ok"} == {(1, 1), (1, 8), (2, 1), (8, 1)}
    assert [row[""] for row in table(points)] == [p["why"] or "predicted" for p in points]
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


def test_a_cache_of_8_bits_is_predicted_and_measured_as_one(tmp_path, monkeypatch) -> None:
    cases = cases_of(config(tmp_path), ["model=glm4_9b_1m", "cache.dtype=bfloat16,fp8_e4m3", "cache.block_size=128"])
    points = Sweep(config(tmp_path), cases).run()
    assert {row["swept"] for row in table(points)} == {"cache.dtype=bfloat16", "cache.dtype=fp8_e4m3"}
    wide, narrow = (point for point in points if point["batch"] == 8)
    assert 0.5 < narrow["ttl_ms"] / wide["ttl_ms"] < 0.9
    lines: list[list[str]] = []
    logs = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("scripts.sweep._start", lambda line, log, timeout_s: (lines.append(line), logs.append(log)))
    monkeypatch.setattr("scripts.sweep._lines", lambda log: ['{"rows": [{"TTL ms": 1}]}'])
    Sweep(SweepConfig(output=str(tmp_path / "measured")), cases).run()
    assert len({*logs}) == len(cases)
    line = lines[-1]
    assert {"scripts.bench_decode", "model=glm4_9b_1m", "cache.dtype=fp8_e4m3", "block_size=128"} <= {*line}


def test_an_output_that_is_a_file_is_refused_by_name(tmp_path) -> None:
    (file := tmp_path / "points").write_text("")
    with pytest.raises(ValueError, match=f"output = {file} cannot be a folder: Not a directory"):
        Sweep(config(file), [])


def test_the_sweeps_own_keys_are_told_from_those_of_its_runs() -> None:
    own, swept = divided(["batch=1", "parallel.kvp=1,2", "hardware=h200", "cache.num_pages=8", "--help"])
    assert own == ["batch=1", "hardware=h200", "--help"]
    assert swept == ["parallel.kvp=1,2", "cache.num_pages=8"]


@pytest.mark.slow(reason="it starts a dozen worlds: about two minutes")
@pytest.mark.timeout(600)
def test_a_measured_sweep_is_interrupted_and_goes_on(tmp_path) -> None:
    make_checkpoint(tmp_path / "model", kv_heads=2)
    (tmp_path / "launch.sh").write_text(  # one point, of 2 ranks and 3 sequences, does not start
        'case "$*" in "2 "*kvp=2*max_batch=3*) echo "error: no such luck" >&2; exit 2;; esac\n'
        'n=$1; shift; exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node $n -m "$@"\n'
    )
    line = [
        sys.executable, "-m", "scripts.sweep", f"model.path={tmp_path}/model", "parallel.kvp=1,2", "parallel.tpa=1,2",
        "batch=1,2,3,4", "context=96", "gpus=2", f"output={tmp_path}/out", "tokens=4", "cache.num_pages=64",
        f"launch=env PYTHON={sys.executable} sh {tmp_path}/launch.sh {{ranks}}",
    ]  # fmt: skip
    file = tmp_path / "out" / "points.jsonl"
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and (not file.exists() or len(file.read_text().splitlines()) < 4):
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    done = file.read_text().splitlines()
    assert 4 <= len(done) < 16
    second = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False)
    assert second.returncode == 1, second.stderr
    lines = file.read_text().splitlines()
    points = [json.loads(each) for each in lines]
    assert lines[: len(done)] == done and len(points) == 16
    assert second.stderr.startswith(f"{len(done) + 1} of 16: ")
    status = {(p["kvp"], p["tpa"], p["batch"]): p["status"] for p in points}
    assert {case for case, each in status.items() if each == "refused"} == {(2, 2, batch) for batch in (1, 2, 3, 4)}
    assert [case for case, each in status.items() if each == "failed"] == [(2, 1, 3)]
    assert all(p["ttl_ms"] > 0 and p["ttft_s"] > 0 for p in points if p["status"] == "ok")
    assert (tmp_path / "out" / "pareto.png").stat().st_size and "no such luck" in second.stderr
    counts = json.loads(second.stdout.splitlines()[-1])
    assert (counts["ok"], counts["refused"], counts["failed"]) == (11, 4, 1)
