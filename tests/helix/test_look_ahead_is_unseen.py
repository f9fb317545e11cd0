"""Steps that are launched before the tokens of the last are read change nothing that a caller can see.

What runs with and without the look-ahead is compared, to the letter: tokens, text, ends, the order of events, counters.
The bodies that rank processes run use graphs where every rank has a GPU.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from helix.graphs import PendingTokens
from helix.request import Chunk
from scripts.make_checkpoint import make_checkpoint
from tests.helix.launched import (
    MAX_TOKENS,
    PROMPTS,
    by_request,
    counters,
    events_of,
    first_new,
    make_llm,
    note_ahead,
    request,
    stopping_requests,
    texts_of,
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("look_ahead") / "model", layers=1)


def mixed_body(path: Path, kvp: int, block_size: int) -> list[Any]:
    """Two turns of requests that stop everywhere, without look-ahead and with it."""
    told = []
    for look_ahead in (False, True):
        llm = make_llm(path, look_ahead, kvp=kvp, block_size=block_size, num_pages=1024, device="auto")
        plain = llm.generate([request(prompt) for prompt in PROMPTS])
        requests = stopping_requests([output.token_ids for output in plain], texts_of(llm, plain))
        turns = []
        for _ in range(2):
            turns += [events_of(llm, requests), counters(llm)]
        told.append(turns)
    return told


@pytest.mark.parametrize(("kvp", "block_size"), [(1, 16), (2, 1), (4, 16)])
def test_sequences_that_stop_at_any_time_are_the_same_to_the_letter(
    ranks: Callable[..., Any], model: Path, kvp: int, block_size: int
) -> None:
    for off, on in ranks(kvp).run(mixed_body, model, kvp, block_size):
        assert on == off
        ends = [event[3][1:3] for event in on[0] if event[3]]
        assert sorted(reason for _, reason in ends) == ["length"] * 3 + ["stop"] * 4
        assert on[1]["output_tokens"] == len(on[0]) < MAX_TOKENS * 7


def tight_body(path: Path, kvp: int, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each request's events where slots or pages are short, without look-ahead and with it."""
    llm = make_llm(path, False, kvp=kvp, device="auto")
    plain = llm.generate([request(prompt) for prompt in PROMPTS])
    requests = stopping_requests([output.token_ids for output in plain], texts_of(llm, plain)) * 2
    told = {}
    for name, settings in ways.items():
        runs = []
        for look_ahead in (False, True):
            llm = make_llm(path, look_ahead, kvp=kvp, device="auto", **settings)
            ahead = note_ahead(llm)
            runs.append((by_request(events_of(llm, requests)), counters(llm)["preemptions"], len(ahead)))
        told[name] = runs
    return told


@pytest.mark.parametrize("kvp", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_preemption_full_batches_and_full_pools_change_no_request(
    ranks: Callable[..., Any], model: Path, kvp: int
) -> None:
    pages = -(-(max(map(len, PROMPTS)) + MAX_TOKENS) // (4 * kvp)) + 1  # little more than the longest needs
    ways = {
        "preempting": {"num_pages": pages, "prefill_chunk": 512},
        "preempting to the host": {"num_pages": pages, "host_pages": 16},
        "one slot": {"max_batch": 1},
        "two slots": {"max_batch": 2, "prefill_chunk": 7},
    }
    if kvp > 1:
        del ways["preempting to the host"], ways["one slot"]
    for told in ranks(kvp).run(tight_body, model, kvp, ways, timeout_s=250):
        for name, ((off, _, none), (on, preemptions, some)) in told.items():
            assert on == off, name
            assert (preemptions > 0) == name.startswith("preempting"), name
            assert none == 0 < some, name


def conversation_body(path: Path, kvp: int) -> list[Any]:
    """A second turn over what the first made, which ended where nobody could foresee it."""
    told = []
    for look_ahead in (False, True):
        llm = make_llm(path, look_ahead, kvp=kvp, device="auto")
        fresh = make_llm(path, False, kvp=kvp, reuse=False, device="auto")
        prompt = PROMPTS[5]
        [plain] = fresh.generate([request(prompt)])
        turns, wanted = [], []
        for least in range(3, 9):  # the stopped step writes at every place of a block, and on a new page
            stop = first_new(plain.token_ids, least)
            [first] = llm.generate([request(prompt, stop_token_ids=[plain.token_ids[stop]])])
            assert first.token_ids == plain.token_ids[: stop + 1]
            second = [*prompt, *first.token_ids, 7, 7]
            turns.append((len(second), events_of(llm, [request(second)]), counters(llm)))
            wanted += [fresh.generate([request(second)])[0].token_ids]
        told.append((turns, wanted))
    return told


@pytest.mark.parametrize("kvp", [1, 2])
def test_a_second_turn_reuses_what_was_made_and_nothing_that_came_after(
    ranks: Callable[..., Any], model: Path, kvp: int
) -> None:
    for off, on in ranks(kvp).run(conversation_body, model, kvp):
        assert on == off
        turns, wanted = on
        assert [events[-1][3][0] for _, events, _ in turns] == wanted
        assert [length - events[-1][3][3] for length, events, _ in turns] == [3] * 6, "two new tokens and the last made"


@pytest.mark.parametrize("max_position", [None, 16])
def test_no_row_and_no_page_goes_past_the_end(model: Path, max_position: int | None) -> None:
    llm = make_llm(model, True, block_size=1, num_pages=15, max_position=max_position, reuse=False)
    prompt = PROMPTS[1]  # 8 tokens; 8 more, the last of which takes no room
    stops: list[int] = []
    original = llm.runner.launch

    def launch(chunks: list[Chunk]) -> PendingTokens:
        stops.extend(chunk.stop for chunk in chunks)
        assert all(len(chunk.seq.blocks.pages) == chunk.stop for chunk in chunks)
        return original(chunks)

    llm.runner.launch = launch  # type: ignore[method-assign]
    [output] = llm.generate([request(prompt, 8 if max_position is None else 50)])
    assert (len(output.token_ids), output.finish_reason) == (8, "length")
    assert stops == list(range(8, 16))


def test_many_short_requests_through_few_slots(model: Path) -> None:
    prompts = [Random(100 + index).choices(range(256), k=1 + index % 9) for index in range(40)]
    plain = make_llm(model, False).generate([request(prompt, 12) for prompt in prompts])
    requests = [
        request(prompt, 1 + index % 12, stop_token_ids=[output.token_ids[index % 7]])
        for index, (prompt, output) in enumerate(zip(prompts, plain, strict=True))
    ]
    off, on = (by_request(events_of(make_llm(model, look, max_batch=3), requests)) for look in (False, True))
    assert on == off
    assert {events[-1][3][2] for events in on} == {"stop", "length"}


def test_sequences_that_draw_share_a_batch_with_greedy_ones(model: Path) -> None:
    requests = [request(PROMPTS[0]), request(PROMPTS[1], 9, temperature=0.9, seed=3, logprobs=1), request(PROMPTS[2])]
    off, on = (make_llm(model, look) for look in (False, True))
    ahead = note_ahead(on)
    assert events_of(on, requests) == events_of(off, requests)
    assert counters(on) == counters(off)
    assert len(ahead) == MAX_TOKENS - 1


def scored_body(path: Path, kvp: int) -> list[Any]:
    """Tokens and log-probabilities, of prompts as well, without look-ahead and with it, and what was launched ahead."""
    requests = [
        request(PROMPTS[1], 20, temperature=0.9, seed=3, logprobs=2),
        request(PROMPTS[0]),
        request(PROMPTS[2], 12, logprobs=0),
        request(PROMPTS[3], 5, logprobs=4, prompt_logprobs=1, logit_bias={"65": 3.0}),
    ]
    told = []
    for look_ahead in (False, True):
        llm = make_llm(path, look_ahead, kvp=kvp, prefill_chunk=9, max_batch=3, device="auto")
        ahead = note_ahead(llm)
        outputs = llm.generate(requests)
        told.append(([(each.token_ids, each.logprobs, each.prompt_logprobs) for each in outputs], len(ahead)))
    return told


@pytest.mark.parametrize("kvp", [1, 2])
def test_log_probabilities_hold_no_step_back_and_are_the_same(ranks: Callable[..., Any], model: Path, kvp: int) -> None:
    for (off, none), (on, some) in ranks(kvp).run(scored_body, model, kvp):
        assert on == off
        assert [each[1] and [len(row.top) for row in each[1]] for each in on] == [[2] * 20, None, [0] * 12, [4] * 5]
        assert none == 0 and some >= 18


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "seed": 3},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {
        "temperature": 0.7,
        "min_p": 0.1,
        "logit_bias": {"65": 3.0},
        "min_tokens": 10,
        "stop_token_ids": [66, 67],
        "seed": 5,
    },
    {},
]


def sampled_body(path: Path, kvp: int) -> list[Any]:
    """Each request's events with settings of all kinds, without look-ahead and with it, where pages are short too."""
    llm = make_llm(path, False, kvp=kvp, device="auto")
    made = llm.generate([request(PROMPTS[3])])[0].token_ids
    words = ((made[0], made[1]), (made[1], made[2]), (made[3], made[4], made[5]), (made[7],))
    requests = [request(prompt, **settings) for prompt, settings in zip(PROMPTS, SAMPLED, strict=True)]
    requests += [request(PROMPTS[3], bad_words=["which the tokenizer of this test has no tokens for"])]
    told = []
    for pages in (256, -(-(max(map(len, PROMPTS)) + MAX_TOKENS) // (4 * kvp)) + 1):
        for look_ahead in (False, True):
            llm = make_llm(path, look_ahead, kvp=kvp, num_pages=pages, prefill_chunk=512, device="auto")
            llm.preparer._prompts.bad_word_ids = lambda asked: words if asked else ()  # type: ignore[method-assign]
            ahead = note_ahead(llm)
            events = by_request(events_of(llm, requests))
            told.append((events, counters(llm)["preemptions"], len(ahead)))
    return told


@pytest.mark.parametrize("kvp", [1, 2])
def test_sequences_of_all_settings_are_launched_ahead_and_the_same(
    ranks: Callable[..., Any], model: Path, kvp: int
) -> None:
    for (off, _, none), (on, _, many), tight_off, (tight, preemptions, some) in ranks(kvp).run(
        sampled_body, model, kvp, timeout_s=250
    ):  # on a GPU five starts compile and capture
        assert on == off == tight == tight_off[0]
        assert none == 0 and many >= MAX_TOKENS - 2 and some > 0 and preemptions > 0
        tokens = [[token for event in events for token in event[1]] for events in on]
        drawn, plain = make_llm(model, False).generate([request(PROMPTS[2], **SAMPLED[2]), request(PROMPTS[3])])
        assert drawn.token_ids == tokens[2]
        made, last = plain.token_ids, tokens[6]
        assert last[0] == made[0] and last[1] != made[1] and made[7] not in last
        assert not {(made[0], made[1]), (made[1], made[2])} & {*pairwise(last)}
