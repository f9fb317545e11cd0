"""Greedy tokens with speculation equal those without, for every layout, block size, drafter and draft length.

The same bodies run over gloo on CPUs, where a graph's steps run as they are written, and over NCCL with captured graphs
where every rank has a GPU. The ranks compare their decisions, drafts among them, at every step.
"""

from random import Random
from typing import Any

import pytest

from helix.sampling import SamplingParams
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import Recorded, make_llm, run, told, use

NUM_TOKENS = 20
SCHEDULE = {"max_draft_len": 5, "draft_len_schedule": {1: 5, 2: 3, 3: 0, 4: 2}}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("speculative") / "model", layers=1))


def prompts(block_size: int) -> list[list[int]]:
    """One token, about a block, several blocks, and one that repeats itself."""
    rng = Random(block_size)
    lengths = (1, max(block_size - 1, 2), 2 * block_size + 5)
    return [*(rng.choices(range(256), k=length) for length in lengths), [1, 2, 3] * 7]


def samplings() -> list[SamplingParams]:
    """Sequences end one by one, so that the batch shrinks."""
    return [SamplingParams(max_tokens=NUM_TOKENS - 4 * i, ignore_eos=True) for i in range(4)]


def parity_body(path: str, kvp: int, tpa: int, block_size: int, runs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """What every run drafted and accepted; a run is (drafter, settings)."""
    from helix.request import Request

    asked = [
        Request(prompt_token_ids=prompt, sampling=sampling)
        for prompt, sampling in zip(prompts(block_size), samplings(), strict=True)
    ]
    plain = run(make_llm(path, kvp=kvp, tpa=tpa, block_size=block_size), asked)
    counts = []
    for number, (name, settings) in enumerate(runs):
        speculative = {"method": "ngram", "ngram_min": 1, **settings}
        graphs = number % 2 == 0
        llm = make_llm(path, kvp=kvp, tpa=tpa, block_size=block_size, graphs=graphs, speculative=speculative)
        if name != "ngram":
            use(llm, Recorded(plain, {"right": 1.0, "mixed": 0.7, "wrong": 0.0}[name], short=name == "mixed"))
        assert told(run(llm, asked)) == told(plain), f"{name}, {settings}"
        counters = llm.metrics.speculative
        assert counters is not None
        counts.append((name, counters.drafted, counters.accepted))
    return counts


def check(results: list[Any], *, drafts: bool = True) -> None:
    assert all(result == results[0] for result in results)
    for name, drafted, accepted in results[0]:
        assert (drafted > 0) == drafts
        if name == "right":
            assert accepted == drafted
        elif name == "wrong":
            assert accepted == 0
        elif name == "mixed":
            assert 0 < accepted < drafted


@pytest.mark.parametrize(
    ("kvp", "tpa", "block_size"),
    [
        (1, 1, 1),
        (1, 1, 64),
        (2, 1, 1),
        (2, 1, 16),
        (2, 1, 64),
        (2, 2, 16),
        (4, 1, 64),
        pytest.param(8, 1, 1, marks=pytest.mark.slow),
    ],
)
def test_tokens_with_speculation_equal_those_without(ranks, model, kvp, tpa, block_size):
    lengths = [{"max_draft_len": length} for length in (4, 8, 3)]
    runs = [("ngram", lengths[0]), ("wrong", lengths[2]), ("mixed", lengths[1]), ("right", SCHEDULE)]
    check(ranks(kvp * tpa).run(parity_body, model, kvp, tpa, block_size, runs, timeout_s=250))


@pytest.mark.parametrize("length", [1, 4, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5, 6, 7))])
def test_tokens_of_every_draft_length_equal_those_without(ranks, model, length):
    settings = {"max_draft_len": length}
    runs = [(name, settings) for name in ("mixed", "right")]
    check(ranks(2).run(parity_body, model, 2, 1, 4, runs))


def test_draft_length_0_drafts_nothing_and_changes_nothing(ranks, model):
    runs = [("ngram", {"max_draft_len": 0}), ("right", {"draft_len_schedule": {8: 0}})]
    check(ranks(2).run(parity_body, model, 2, 1, 4, runs), drafts=False)
