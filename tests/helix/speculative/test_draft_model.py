"""A draft model changes no token; one that is the target itself is always right, so its cache must be too."""

import shutil
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest
import torch

from helix.config import DraftModelConfig, SpeculativeConfig
from helix.request import Request
from helix.sampling import SamplingParams
from helix.speculative.draft_model import DraftModel
from scripts.make_checkpoint import make_checkpoint
from tests.helix.speculative.world import make_llm, run, told

RNG = Random(3)
PROMPTS = [RNG.choices(range(256), k=length) for length in (40, 1, 17, 70)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    @cache
    def make(name: str, **sizes: Any) -> str:
        return str(make_checkpoint(tmp_path_factory.mktemp("draft") / name, **sizes))

    return make


@pytest.fixture(scope="session")
def model(checkpoint: Callable[..., str]) -> str:
    return checkpoint("target", layers=2)


@pytest.fixture(scope="session")
def other(checkpoint: Callable[..., str]) -> str:
    """Another family, half the size, the same vocabulary."""
    return checkpoint("other", family="glm", layers=1, hidden=32, heads=4, kv_heads=2, ffn=64, seed=5)


def requests(num_tokens: int = 24) -> list[Request]:
    """Greedy and drawn; they end one by one."""
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 1}, {}, {"logprobs": 1}]
    return [
        Request(
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=num_tokens - 3 * i, ignore_eos=True, **settings[i]),
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def greedy_requests() -> list[Request]:
    """Ends far apart, so that the batch shrinks to one and stays there for a while."""
    lengths = (28, 6, 11, 17)
    return [
        Request(prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=length, ignore_eos=True))
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]


def drafting(path: str, **speculative: Any) -> dict[str, Any]:
    return {"method": "draft_model", "model": DraftModelConfig(path=path), **speculative}


def parity_body(path: str, draft: str, kvp: int, tpa: int, runs: list[tuple[int, bool, dict[str, Any]]]) -> list[Any]:
    """What was drafted and accepted; a run is (block_size, graphs, settings)."""
    figures = []
    for block_size, graphs, settings in runs:
        speculative = drafting(draft, **settings)
        place = {"kvp": kvp, "tpa": tpa, "block_size": block_size, "prefill_chunk": 32}
        asked = greedy_requests() if draft == path else requests()
        expected = run(make_llm(path, **place), asked)
        llm = make_llm(path, graphs=graphs, speculative=speculative, **place)
        assert told(run(llm, asked)) == told(expected)
        counters = llm.metrics.speculative
        assert counters is not None
        figures.append((counters.drafted, counters.accepted, sorted(counters.steps.items())))
    return figures


@pytest.mark.parametrize(("kvp", "tpa"), [(1, 1), (2, 1), (4, 1), pytest.param(8, 1, marks=pytest.mark.slow), (2, 2)])
def test_a_draft_model_equal_to_the_target_is_always_right(ranks, model, kvp, tpa):
    runs = [(16, False, {"max_draft_len": 4}), (1, True, {"max_draft_len": 3}), (64, True, {"max_draft_len": 8})]
    chosen = {4: runs[:1], 8: runs[1:2]}.get(kvp * tpa, runs)
    results = ranks(kvp * tpa).run(parity_body, model, model, kvp, tpa, chosen, timeout_s=250)
    assert all(result == results[0] for result in results)
    for drafted, accepted, _ in results[0]:
        assert drafted == accepted > 20


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_its_cache_catches_up_when_the_draft_length_comes_back(ranks, model, graphs):
    """Lengths 0 for a while, then not, then 0 again: what it drafts after that is still all right."""
    schedule = {"max_draft_len": 4, "draft_len_schedule": {1: 4, 2: 0, 3: 3, 4: 0}}
    for drafted, accepted, steps in ranks(2).run(parity_body, model, model, 2, 1, [(4, graphs, schedule)])[0]:
        assert drafted == accepted > 10
        assert {0, 3, 4} <= {length for length, _ in steps} <= set(range(5))


@pytest.mark.parametrize(("kvp", "tpa"), [(1, 1), (2, 1)])
def test_tokens_with_another_model_equal_those_without(ranks, model, other, kvp, tpa):
    runs = [(16, True, {"max_draft_len": 4}), (1, False, {"max_draft_len": 5, "draft_len_schedule": {2: 5, 4: 1}})]
    results = ranks(kvp * tpa).run(parity_body, model, other, kvp, tpa, runs)
    assert all(result == results[0] for result in results)
    for drafted, accepted, _ in results[0]:
        assert accepted < drafted > 20


def tampered_body(path: str) -> Any:
    """Rank 1's draft model has other weights."""
    expected = run(make_llm(path, kvp=2), requests())
    llm = make_llm(path, kvp=2, speculative=drafting(path))
    drafter = llm.engine.speculator and llm.engine.speculator.drafter
    assert isinstance(drafter, DraftModel)
    if llm.launch.rank == 1:
        head = drafter._runner.decoder.top["lm_head"]
        head.copy_(head.flip(0).clone())
    assert told(run(llm, requests())) == told(expected)
    assert llm.metrics.speculative is not None
    return llm.metrics.speculative.as_dict()


def test_ranks_whose_draft_models_differ_use_rank_0s_drafts(ranks, model):
    one, other = ranks(2).run(tampered_body, model)
    assert one == other
    assert one["acceptance_rate"] > 0.5


def test_a_long_prompt_is_caught_up_in_chunks_while_the_target_decodes(model: str) -> None:
    prompt = RNG.choices(range(256), k=200)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = run(make_llm(model), [prompt], sampling)
    llm = make_llm(model, prefill_chunk=32, speculative=drafting(model))
    drafter = llm.engine.speculator and llm.engine.speculator.drafter
    assert isinstance(drafter, DraftModel)
    rows: list[int] = []
    compute = drafter._runner.run

    def spy(chunks: Any) -> torch.Tensor:
        rows.append(sum(chunk.num_rows for chunk in chunks))
        return compute(chunks)

    drafter._runner.run = spy  # type: ignore[method-assign]
    assert told(run(llm, [prompt], sampling)) == told(expected)
    assert [count for count in rows if count > 2] == [32] * 6 + [200 + 6 - 6 * 32]
    counters = llm.metrics.speculative
    assert counters is not None
    assert (counters.turns - counters.drafted_turns, counters.accepted) == (6, counters.drafted)


def test_a_draft_model_with_a_shorter_context_stops_at_its_end(model: str, checkpoint: Callable[..., str]) -> None:
    short = checkpoint("short", layers=2, max_position=50)
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    for graphs in (False, True):
        asked = [PROMPTS[0], PROMPTS[3]]
        expected = run(make_llm(model), asked, sampling)
        llm = make_llm(model, graphs=graphs, speculative=drafting(short))
        assert told(run(llm, asked, sampling)) == told(expected)
        counters = llm.metrics.speculative
        assert counters is not None
        assert counters.accepted == counters.drafted == 8, "9 tokens fit after the first: 41 to 45, 46 to 50"


def test_short_pages_of_its_own_mean_fewer_drafts_and_nothing_else(model: str) -> None:
    expected = run(make_llm(model, block_size=4), requests())
    llm = make_llm(model, block_size=4, speculative=drafting(model))
    drafter = llm.engine.speculator and llm.engine.speculator.drafter
    assert isinstance(drafter, DraftModel)
    held = [drafter._pool.take(0) for _ in range(drafter._pool.num_pages - 20)]
    outputs = llm.generate(requests())
    assert told(outputs) == told(expected)
    assert llm.metrics.speculative is not None and llm.metrics.speculative.drafted > 10
    assert drafter._pool.num_free(0) == 20 and len(held) > 20


@pytest.mark.parametrize("room", [0, 1, 2])
def test_guesses_that_no_page_was_left_for_may_come_true(
    model: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(make_llm(model), greedy_requests())
    llm = make_llm(model, speculative=drafting(model, max_draft_len=4))
    extend = llm.engine.scheduler.extend_for_drafts
    monkeypatch.setattr(
        llm.engine.scheduler, "extend_for_drafts", lambda seq, num_drafts: extend(seq, min(num_drafts, room))
    )
    assert told(run(llm, greedy_requests())) == told(expected)


def test_preempted_sequences_draft_again_when_they_come_back(model: str) -> None:
    settings: dict[str, Any] = {"block_size": 4, "num_pages": 26, "prefill_chunk": 512}
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = run(make_llm(model, **settings), PROMPTS[:3], sampling)
    for graphs in (False, True):
        llm = make_llm(model, graphs=graphs, speculative=drafting(model), **settings)
        assert told(run(llm, PROMPTS[:3], sampling)) == told(expected)
        assert llm.metrics.cache.preemptions > 0
        counters = llm.metrics.speculative
        assert counters is not None and counters.drafted == counters.accepted > 20


# --- settings ---------------------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused(model: str, checkpoint: Callable[..., str]) -> None:
    message = "speculative.model has a vocabulary of 330 tokens and the model one of 320; a draft model must share"
    with pytest.raises(ValueError, match=message):
        make_llm(model, speculative=drafting(checkpoint("wide", vocab=330)))


def test_a_draft_model_that_is_not_there_is_named(model: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="^speculative.model.path = /nowhere does not exist"):
        make_llm(model, speculative=drafting("/nowhere"))
    with pytest.raises(ValueError, match="^speculative.model.path is empty: give a Hugging Face checkpoint folder"):
        make_llm(model, speculative=drafting(""))
    shutil.copy(f"{model}/config.json", tmp_path)
    with pytest.raises(ValueError, match="^speculative.model.path = .* has no weights"):
        make_llm(model, speculative=drafting(str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "medusa"}, "speculative.method = 'medusa' must be one of none, ngram, draft_model, mtp, eagle3"),
        ({"ngram_min": 0}, "speculative.ngram_min = 0 must be at least 1"),
        ({"ngram_min": 3, "ngram_max": 2}, "speculative.ngram_max = 2 must be at least speculative.ngram_min = 3"),
        ({"max_draft_len": 2, "draft_len_schedule": {4: 3}}, "exceeds speculative.max_draft_len = 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig(**settings)


def test_a_schedule_is_sorted_when_the_settings_are_made() -> None:
    config = SpeculativeConfig(draft_len_schedule={32: 1, 4: 4})
    assert list(config.draft_len_schedule) == [4, 32]
    assert config.schedule.draft_len(33) == 0


def test_the_draft_models_own_settings_are_checked_by_name() -> None:
    with pytest.raises(ValueError, match="^speculative.model.load = 'pickle' must be one of checkpoint, dummy"):
        DraftModelConfig(load="pickle")
