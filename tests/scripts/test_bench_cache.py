"""The cache benchmark runs without a GPU, and ends with one JSON line that holds its figures."""

import json

import pytest

from scripts.bench_cache import BenchCacheConfig, run


def test_the_control_plane_is_measured_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run(BenchCacheConfig(tokens=8192, requests=8, shared_tokens=2048, repeats=3))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["device"], figures["match"]["blocks"], len(figures["admission"])) == ("cpu", 128, 4)
    assert 0 < figures["match"]["ratio"] < 20
    assert all(row["admit_us_per_request"] > 0 for row in figures["admission"])


def test_counts_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="requests = 0 must be at least 1"):
        BenchCacheConfig(requests=0)
