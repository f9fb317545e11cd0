"""The benchmark of experts, as far as a CPU goes: the peer computes the same, and every column is filled."""

import pytest
import torch

from scripts import bench_experts
from scripts.bench_experts import BenchExpertsConfig, grouped, make_weights, measure

CPU = torch.device("cpu")
SMALL = BenchExpertsConfig(hidden_size=64, num_experts=6, num_chosen=2, ffn_size=32)


def once(calls, *, repeats, iterations):
    """Stand in for the clock: every call runs; they take 2 us."""
    for call in calls:
        call()
    return 2.0, 0.1


def test_a_row_holds_every_column(monkeypatch):
    monkeypatch.setattr(bench_experts, "graph_us", once)
    layers = [make_weights(SMALL, 32, CPU) for _ in range(2)]
    row = measure(SMALL, 1, 64, layers, 1e6)
    assert (row["rows"], row["experts in use"], row["ours/grouped"]) == (64, 6, 1.0)
    assert row["floor us"] == pytest.approx(6 * 3 * 32 * 64 * 2 / 1e6)


def test_a_peer_that_computes_something_else_is_found(monkeypatch):
    monkeypatch.setattr(bench_experts, "graph_us", once)
    monkeypatch.setattr(bench_experts, "grouped", lambda x, *rest: grouped(x, *rest).roll(1, 0))
    with pytest.raises(AssertionError, match="differ from the library's grouped products"):
        measure(SMALL, 1, 8, [make_weights(SMALL, 32, CPU)], 1e6)
