"""Speculation beside everything else a run does: ends, log-probabilities, penalties, pages, reuse, preemption."""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from helix.cache.control import CacheControl
from helix.config import DraftModelConfig, SchedulerConfig
from helix.llm import LLM
from helix.request import Request, RequestOutput
from helix.sampling import SamplingParams
from helix.scheduler import Scheduler
from parallel.placement import BlockCyclic
from scripts.make_checkpoint import make_checkpoint
from tests.helix.cache.world import path_of
from tests.helix.scheduling import make_sequence
from tests.helix.speculative.world import Recorded, make_llm, run, told, use

DOCUMENT = Random(7).choices(range(256), k=40)
PROMPTS = [DOCUMENT, [5, 6], [9, 8, 7] * 4, [*DOCUMENT[:30], 1, 2, 3, 4], [31] * 17]
SPECULATIVE = {"method": "ngram", "max_draft_len": 4}


def greedy(num_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, **settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("speculation") / "model", layers=2))


@pytest.fixture(scope="module")
def plain(model: str) -> LLM:
    return make_llm(model, prefill_chunk=32, cache={"reuse": False})


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "graphs"])
def llm(model: str, request: pytest.FixtureRequest) -> LLM:
    return make_llm(model, prefill_chunk=32, cache={"reuse": False}, graphs=request.param, speculative=SPECULATIVE)


@pytest.fixture(scope="module")
def known(plain: LLM) -> list[RequestOutput]:
    """What each prompt goes on with, for 60 tokens."""
    return run(plain, PROMPTS, greedy(60))


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(3, 9))
def test_a_stop_string_inside_an_accepted_run_cuts_it_there(
    plain: LLM, known: list[RequestOutput], llm: LLM, at: int
) -> None:
    text = known[0].text
    first = next(i for i in range(at, len(text)) if text[i].isascii() and text.find(text[i]) == i)
    use(llm, Recorded(known[:1], 1.0))
    stop = greedy(60, stop=["never seen", text[first]])
    stopped, expected = run(llm, [PROMPTS[0]], stop), run(plain, [PROMPTS[0]], stop)
    assert told(stopped) == told(expected)
    assert (stopped[0].text, stopped[0].finish_reason) == (text[:first], "stop")


@pytest.mark.parametrize("at", range(1, 8))
def test_a_stop_token_inside_an_accepted_run_cuts_it_there(known: list[RequestOutput], llm: LLM, at: int) -> None:
    output = known[1]
    first = output.token_ids.index(output.token_ids[at])
    use(llm, Recorded([output], 1.0))
    stop = greedy(20, stop_token_ids=[output.token_ids[at]])
    [stopped] = run(llm, [PROMPTS[1]], stop)
    assert (stopped.token_ids, stopped.finish_reason) == (output.token_ids[: first + 1], "stop")
    counters = llm.metrics.speculative
    assert counters is not None and counters.tokens == first, "the first token is the prompt's"
    assert counters.accepted <= first
    assert llm.metrics.tokens_per_rank == [len(PROMPTS[1]) + first], "the last token of a sequence is never stored"


@pytest.mark.parametrize("number", range(1, 12, 2))
def test_max_tokens_is_met_exactly_and_never_drafted_beyond(
    plain: LLM, known: list[RequestOutput], llm: LLM, number: int
) -> None:
    use(llm, Recorded(known, 1.0))
    assert told(run(llm, PROMPTS, greedy(number))) == told(run(plain, PROMPTS, greedy(number)))
    counters = llm.metrics.speculative
    assert counters is not None
    assert counters.accepted == counters.drafted, "a draft that could never be used was computed"
    turns = -(-(number - 1) // 5)  # runs of 5 tokens after the prompt's own
    assert counters.turns == turns * len(PROMPTS)
    assert counters.drafted == (number - 1 - turns) * len(PROMPTS)


def test_streamed_events_joined_are_the_outputs(plain: LLM, llm: LLM) -> None:
    outputs = run(plain, PROMPTS, greedy(30))
    use(llm, Recorded(outputs, 0.8))
    events = list(llm.stream(PROMPTS, greedy(30)))
    for index, output in enumerate(outputs):
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == output.token_ids
        assert "".join(event.text for event in mine) == output.text
        assert [event.output is None for event in mine] == [True] * (len(mine) - 1) + [False]


def test_a_stream_that_is_left_early_frees_everything_it_held(plain: LLM, llm: LLM) -> None:
    outputs = run(plain, PROMPTS, greedy(30))
    drafter = Recorded(outputs, 0.8)
    use(llm, drafter)
    stream = llm.stream(PROMPTS, greedy(30))
    for _ in range(25):
        next(stream)
    assert drafter.running
    stream.close()
    assert not drafter.running
    assert told(run(llm, PROMPTS, greedy(30))) == told(outputs)


# --- what a request asks for ------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.9, "seed": 3},
    {"logprobs": 2},
    {"temperature": 0.7, "top_k": 30, "seed": 4, "logprobs": 0},
    {"repetition_penalty": 1.4, "logprobs": 1},
    {"temperature": 1.1, "top_p": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.5, "seed": 5},
]


@pytest.mark.parametrize("p", [0.0, 0.6, 1.0])
def test_drawn_and_penalised_tokens_and_log_probabilities_equal_those_without(plain: LLM, llm: LLM, p: float) -> None:
    asked = [
        Request(prompt_token_ids=prompt, sampling=greedy(24, **settings))
        for prompt, settings in zip(PROMPTS, SETTINGS, strict=True)
    ]
    expected = run(plain, asked)
    use(llm, Recorded(expected, p))
    outputs = run(llm, asked)
    assert told(outputs) == told(expected)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert [each.token_id for each in ours.logprobs or []] == [each.token_id for each in theirs.logprobs or []]
        for one, other in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.top == pytest.approx(other.top, abs=1e-4)
    counters = llm.metrics.speculative
    assert counters is not None and counters.drafted > 0
    if p in (0.0, 1.0):
        assert counters.accepted == p * counters.drafted


def test_a_result_does_not_depend_on_who_shares_the_batch_or_what_is_drafted(plain: LLM, llm: LLM) -> None:
    asked = [
        Request(prompt_token_ids=prompt, sampling=greedy(20, temperature=0.8, seed=seed))
        for seed, prompt in enumerate(PROMPTS)
    ]
    together = run(plain, asked)
    for index, request in enumerate(asked):
        use(llm, Recorded([together[index]], 0.5))
        assert told(run(llm, [request])) == told([together[index]])


# --- pages ------------------------------------------------------------------------------------------------------------


def test_drafts_are_fewer_where_pages_are_short_and_preempt_nobody() -> None:
    scheduler = Scheduler(SchedulerConfig(max_batch=2, prefill_chunk=64), CacheControl(BlockCyclic(2, 2), 3))
    one, other = make_sequence(0, 5, 9), make_sequence(1, 3, 9)
    scheduler.add(one)
    scheduler.add(other)
    assert len(scheduler.schedule().chunks) == 2  # 3 and 2 of 6 pages of 2 tokens
    assert scheduler.extend_for_drafts(one, 8) == 3, "one token in its last page, two in the last free one"
    assert len(one.blocks.pages) == 4
    assert scheduler.extend_for_drafts(other, 8) == 1, "what its last page has room for"
    assert scheduler.extend_for_drafts(other, 0) == 0
    assert (scheduler.running, scheduler.cache.counters.preemptions) == ([one, other], 0)


def test_only_accepted_tokens_enter_the_prefix_tree(model: str, plain: LLM) -> None:
    llm = make_llm(model, block_size=4, num_pages=256, prefill_chunk=32, speculative=SPECULATIVE)
    outputs = run(plain, PROMPTS, greedy(30))
    for p in (0.0, 0.5, 1.0):
        use(llm, Recorded(outputs, p))
        seen: list[list[int]] = []
        for _ in llm.stream(PROMPTS, greedy(30)):
            seen += [path_of(block)[1] for block in llm.engine.scheduler.cache.blocks.tree.walk()]
        whole = [prompt + output.token_ids for prompt, output in zip(PROMPTS, outputs, strict=True)]
        assert len(seen) > 100
        assert all(any(tokens == each[: len(tokens)] for each in whole) for tokens in seen)
    assert [output.cached_tokens for output in run(llm, [whole[0]], greedy(1))] == [len(whole[0]) - 1]


WAYS: dict[str, dict[str, Any]] = {
    "no reuse": {"cache": {"reuse": False}, "num_pages": 256},
    "roomy": {"num_pages": 256},
    "whole blocks": {"cache": {"partial_reuse": False}, "num_pages": 256},
    "tight": {"num_pages": 0},
    "host": {"num_pages": 0, "cache": {"host_pages": 64}},
    "preempting": {"num_pages": 0, "prefill_chunk": 512},
}


def ways_body(path: str, kvp: int) -> dict[str, Any]:
    """Run every way cold and warm, with drafts right at times, and return what the caches and drafters did."""
    block_size, num_tokens = 4, 16
    requests = [
        Request(prompt_token_ids=prompt, sampling=greedy(num_tokens, **settings), cache_salt="")
        for prompt, settings in zip(PROMPTS, [{}, {"temperature": 0.9, "seed": 5}] * 3, strict=False)
    ]
    expected = run(make_llm(path, kvp=kvp, block_size=block_size, num_pages=256, cache={"reuse": False}), requests)
    tight = -(-(len(PROMPTS[0]) + num_tokens) // (block_size * kvp)) + 1  # pages a rank: little more than one sequence
    counters: dict[str, Any] = {}
    for number, (name, settings) in enumerate(WAYS.items()):
        settings = {"prefill_chunk": 16, **settings, "num_pages": settings["num_pages"] or tight}
        graphs = number % 2 == 0
        llm = make_llm(path, kvp=kvp, block_size=block_size, graphs=graphs, speculative=SPECULATIVE, **settings)
        use(llm, Recorded(expected, 0.7))
        for turn in ("cold", "warm"):
            assert told(run(llm, requests)) == told(expected), f"{name}, {turn}"
            counters[f"{name}, {turn}"] = llm.metrics.as_dict()
    for figures in counters.values():
        assert 0 < figures["speculative"]["accepted"] < figures["speculative"]["drafted"]
    return {name: (figures["cache"], figures["speculative"]) for name, figures in counters.items()}


@pytest.mark.parametrize("kvp", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_tokens_are_the_same_however_they_were_cached(ranks: Callable[..., Any], model: str, kvp: int) -> None:
    results = ranks(kvp).run(ways_body, model, kvp, timeout_s=250)
    assert all(result == results[0] for result in results)
    caches = {name: cache for name, (cache, _) in results[0].items()}
    assert caches["no reuse, warm"]["tokens_reused"] == 0
    assert caches["roomy, warm"]["tokens_missed"] == len(PROMPTS)
    assert caches["tight, warm"]["blocks_evicted"] > 0
    assert caches["host, warm"]["blocks_onboarded"] > 0
    assert caches["preempting, cold"]["preemptions"] > 0


# --- the draft length of a step ---------------------------------------------------------------------------------------


def test_the_draft_length_follows_a_batch_that_shrinks_from_40_to_1(model: str) -> None:
    """They end one by one; the recorded draft lengths are those of each step's batch."""
    lengths = {4: 4, 8: 2, 32: 1}
    asked = [Request(prompt_token_ids=[i], sampling=greedy(2 + 2 * i + 10 * (i == 39))) for i in range(40)]
    settings: dict[str, Any] = {"max_batch": 40, "num_pages": 1024}
    expected = run(make_llm(model, **settings), asked)
    llm = make_llm(model, graphs=True, speculative={**SPECULATIVE, "draft_len_schedule": lengths}, **settings)
    use(llm, Recorded(expected, 0.6))
    speculator, seen = llm.engine.speculator, []
    assert speculator is not None
    propose = speculator.propose

    def spy(step: Any, *rest: Any) -> None:
        batch = sum(chunk.is_decode for chunk in step.chunks)
        propose(step, *rest)
        longest = max((len(chunk.drafts) for chunk in step.chunks), default=0)
        seen.append((batch, longest))

    speculator.propose = spy  # type: ignore[method-assign]
    assert told(run(llm, asked)) == told(expected)
    batches = [batch for batch, _ in seen if batch]
    assert batches[0] == 40 and batches[-1] == 1 and batches == sorted(batches, reverse=True)
    assert len(set(batches)) > 15
    allowed = [next((k for n, k in lengths.items() if batch <= n), 0) for batch in batches]
    drafted = [longest for batch, longest in seen if batch]
    assert set(allowed) == set(drafted) & set(allowed) == {0, 1, 2, 4}
    assert all(longest <= length for longest, length in zip(drafted, allowed, strict=True))
    assert llm.metrics.speculative is not None and llm.metrics.speculative.steps == Counter(drafted)
    for batch, longest in seen:
        limit = next((k for n, k in lengths.items() if batch <= n), 0)
        assert longest == limit or batch <= 4, "a batch of more than 4 has a sequence that is not at its end"
        assert longest <= limit


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_steps_without_drafts_look_ahead_between_steps_that_draft(
    model: str, plain: LLM, method: str, graphs: bool
) -> None:
    """Sequences end by length and, unforeseen, by a stop token, so that the draft length goes up and down."""
    known = run(plain, PROMPTS, greedy(48))
    stops = [[], [], [known[2].token_ids[20]], [], [known[4].token_ids[9]]]
    asked = [
        Request(prompt_token_ids=prompt, sampling=greedy(length, stop_token_ids=stop))
        for prompt, length, stop in zip(PROMPTS, (48, 11, 40, 30, 40), stops, strict=True)
    ]
    expected = run(plain, asked)
    assert {output.finish_reason for output in expected} == {"stop", "length"}
    settings = {"max_draft_len": 3, "draft_len_schedule": {1: 3, 2: 0, 3: 2, 5: 0}, "method": method}
    settings["model"] = DraftModelConfig(path=model)
    llm = make_llm(model, look_ahead=True, graphs=graphs, cache={"reuse": False}, speculative=settings)
    if method == "ngram":
        use(llm, Recorded(expected, 0.6))
    depart_ahead, ahead = llm.engine._depart_ahead, []

    def spy(flight: Any) -> Any:
        ahead.append(depart_ahead(flight))
        return ahead[-1]

    llm.engine._depart_ahead = spy  # type: ignore[method-assign]
    assert told(run(llm, asked)) == told(expected)
    counters = llm.metrics.speculative
    assert counters is not None
    assert {0, 2, 3} <= set(counters.steps) <= {0, 1, 2, 3}
    launched = [flight for flight in ahead if flight is not None]
    assert len(launched) > 5 and not any(chunk.drafts for flight in launched for chunk in flight.step.chunks)
    assert counters.tokens == sum(len(output.token_ids) for output in expected) - len(PROMPTS)
    if method == "draft_model":
        assert counters.drafted > 10
        assert 0 <= counters.drafted - counters.accepted < 3, "only what stands behind a stop token in its run"


def test_metrics_say_what_speculation_was_worth(plain: LLM, llm: LLM) -> None:
    [output] = run(plain, [PROMPTS[0]], greedy(21))
    use(llm, Recorded([output], 1.0))
    run(llm, [PROMPTS[0]], greedy(21))
    figures = llm.metrics.as_dict()
    assert figures["speculative"] == {
        "drafted": 16,
        "accepted": 16,
        "acceptance_rate": 1.0,
        "mean_accepted_len": 4.0,
        "tokens_per_target_step": 5.0,
        "steps_per_draft_len": {"4": 4},
    }
    assert (figures["output_tokens"], len(llm.metrics.ttft_s), len(llm.metrics.ttl_s)) == (21, 1, 20)
    assert plain.metrics.as_dict()["speculative"] is None


def test_steps_are_counted_by_what_was_drafted_and_not_by_what_was_asked_for(plain: LLM, llm: LLM) -> None:
    outputs = run(plain, PROMPTS[1:3], greedy(23))
    use(llm, Recorded(outputs, 1.0))
    run(llm, PROMPTS[1:3], greedy(23))
    counters = llm.metrics.speculative
    assert counters is not None
    assert counters.steps == {4: 4, 1: 1}, "the last of 23 tokens is drafted by nobody"
    use(llm, Recorded([RequestOutput(None), RequestOutput(None)], 1.0))  # knows nothing
    run(llm, PROMPTS[1:3], greedy(23))
    counters = llm.metrics.speculative
    assert counters is not None
    assert (counters.steps, counters.drafted, counters.turns) == ({0: 22}, 0, 44)


def test_full_drafts_pad_no_row_and_short_ones_only_within_their_length(model: str, plain: LLM) -> None:
    # all prompts in one step: none is still computed beside others that decode, fewer than their graph has room for
    llm = make_llm(model, graphs=True, max_batch=4, prefill_chunk=2048, speculative=SPECULATIVE)
    asked = [*PROMPTS[:3], PROMPTS[4]]
    outputs = run(plain, asked, greedy(41))
    use(llm, Recorded(outputs, 1.0))
    assert told(run(llm, asked, greedy(41))) == told(outputs)
    assert llm.metrics.padding_rows == 0
    use(llm, Recorded(outputs, 1.0, short=True))
    assert told(run(llm, asked, greedy(41))) == told(outputs)
    counters = llm.metrics.speculative
    assert counters is not None
    assert 0 < llm.metrics.padding_rows <= 4 * counters.turns - counters.drafted
