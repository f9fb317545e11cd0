"""One graph for each reachable pair of batch bucket and draft length; rows lie in it with padding at the head."""

from typing import Any

import numpy as np
import pytest
import torch

from helix.config import DraftModelConfig
from helix.decode_rows import DecodeRows
from helix.graphs import StepGraph
from helix.llm import LLM
from helix.request import Request
from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import Recorded, make_llm, run, told, use

SCHEDULE = {"method": "ngram", "max_draft_len": 4, "draft_len_schedule": {2: 4, 5: 2, 6: 1}}
PROMPTS = [[i, 2, 3, 4, 5, 6] for i in range(7)]  # more rows than any run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("graphs") / "model", layers=1))


def rows_of(counts: list[int]) -> DecodeRows:
    """Rows whose fields tell them apart; sequence i is in batch slot 10 + i."""
    slots = np.repeat(10 + np.arange(len(counts)), counts)
    number = np.arange(sum(counts))
    return DecodeRows(number, 100 + number, 200 + number, slots, 300 + number, np.array(counts))


NAMES = ("token_ids", "positions", "slot", "row_seq", "visible_len", "before", "keep")


@pytest.mark.parametrize("counts", [[3, 3], [1, 3], [3, 1], [2, 1], [1, 1], [2]])
def test_rows_stand_at_the_end_of_their_run_and_padding_sees_and_stores_nothing(counts: list[int]) -> None:
    rows, run_len = rows_of(counts), 3
    inputs = {name: np.full(3 * run_len, 7) for name in NAMES}
    rows.fill(inputs, run_len, padding_slot=99)
    tokens, positions, slot, row_seq, visible = (inputs[name].reshape(3, run_len) for name in NAMES[:5])
    at = 0
    for sequence, count in enumerate(counts):
        assert (row_seq[sequence] == 10 + sequence).all(), "a run has one page table"
        pad = run_len - count
        assert (slot[sequence, :pad] == -1).all() and (visible[sequence, :pad] == 0).all()
        for field, first in ((tokens, 0), (positions, 100), (slot, 200), (visible, 300)):
            assert field[sequence, pad:].tolist() == list(range(first + at, first + at + count))
        at += count
    rest = slice(len(counts), None)
    assert (row_seq[rest] == 99).all() and (slot[rest] == -1).all() and (visible[rest] == 0).all()


def graph_sizes(llm: LLM) -> list[tuple[int, int]]:
    assert llm.runner._graphs is not None
    return [(graph.num_runs, graph.run_len) for graph in llm.runner._graphs.graphs]


def test_there_is_a_graph_for_each_reachable_pair_and_no_other(model: str) -> None:
    llm = make_llm(model, graphs=True, speculative=SCHEDULE)
    assert graph_sizes(llm) == [(1, 1), (1, 5), (2, 1), (2, 5), (4, 1), (4, 3), (8, 1), (8, 2), (8, 3)]
    assert graph_sizes(make_llm(model, graphs=True)) == [(1, 1), (2, 1), (4, 1), (8, 1)]


@pytest.mark.parametrize(
    ("batch", "longest", "found"),
    [(1, 1, (1, 1)), (1, 2, (1, 5)), (1, 6, None), (3, 3, (4, 3)), (3, 4, None), (7, 1, (8, 1)), (5, 2, (8, 2))],
)
def test_a_step_takes_its_buckets_graph_of_the_shortest_runs_that_hold_it(
    model: str, batch: int, longest: int, found: tuple[int, int] | None
) -> None:
    llm = make_llm(model, graphs=True, speculative=SCHEDULE)
    assert llm.runner._graphs is not None
    graph = llm.runner._graphs.find(batch, longest)
    assert (graph and (graph.num_runs, graph.run_len)) == found


def launched(llm: LLM) -> list[tuple[int, int]]:
    """Note which graphs are launched from now on."""
    assert llm.runner._graphs is not None
    sizes: list[tuple[int, int]] = []
    launch = llm.runner._graphs.launch

    def spy(graph: StepGraph, *given: Any) -> Any:
        sizes.append((graph.num_runs, graph.run_len))
        return launch(graph, *given)

    llm.runner._graphs.launch = spy  # type: ignore[method-assign]
    return sizes


def test_every_decode_step_of_a_shrinking_batch_runs_in_the_graph_of_its_pair(model: str) -> None:
    asked = [SamplingParams(max_tokens=4 + 6 * i, ignore_eos=True) for i in range(7)]
    plain, llm = make_llm(model), make_llm(model, graphs=True, speculative=SCHEDULE)
    requests = [
        Request(prompt_token_ids=prompt, sampling=sampling) for prompt, sampling in zip(PROMPTS, asked, strict=True)
    ]
    expected = run(plain, requests)
    use(llm, Recorded(expected, 0.5))
    sizes = launched(llm)
    assert told(run(llm, requests)) == told(expected)
    counters = llm.metrics.speculative
    assert counters is not None and len(sizes) == counters.steps.total(), "a decode step ran without a graph"
    assert {(8, 1), (8, 2), (8, 3), (4, 3), (2, 5), (1, 5)} <= set(sizes) <= set(graph_sizes(llm))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_captured_steps_make_the_tokens_of_eager_ones_and_of_themselves(model: str, method: str) -> None:
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    settings = {"method": method, "max_draft_len": 4, "ngram_min": 1, "model": DraftModelConfig(path=model)}
    expected = run(make_llm(model), PROMPTS, sampling)
    llm = make_llm(model, graphs=True, speculative=settings)
    assert llm.runner._graphs is not None and llm.runner._graphs.graphs[0].graph is not None
    for _ in range(2):
        assert told(run(llm, PROMPTS, sampling)) == told(expected)
        torch.cuda.synchronize()
    if method == "draft_model":
        assert llm.metrics.speculative is not None
        assert llm.metrics.speculative.accepted == llm.metrics.speculative.drafted > 100
