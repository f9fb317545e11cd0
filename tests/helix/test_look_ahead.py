"""Decode steps that are launched before the tokens of the last are read change nothing that a caller can see.

What runs with and without the look-ahead is compared, to the letter: tokens, text, ends, the order of events, counters.
The bodies that rank processes run use graphs where every rank has a GPU.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from helix import LLM, HelixConfig, Request, RequestOutput, SamplingParams
from helix.config import CacheConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from helix.graphs import PendingTokens
from helix.lost import RankLost
from helix.request import Chunk, StreamEvent
from helix.scheduler import Step
from scripts.make_checkpoint import make_checkpoint

PROMPTS = [Random(index).choices(range(256), k=3 + 5 * index) for index in range(6)]
MAX_TOKENS = 24


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("look_ahead") / "model", layers=1)


def make_llm(
    path: Path, look_ahead: bool, *, kvp: int = 1, block_size: int = 4, num_pages: int = 256, max_batch: int = 8,
    prefill_chunk: int = 64, max_position: int | None = None, check_ranks: bool = False, device: str = "cpu",
    **cache: Any,
) -> LLM:  # fmt: skip
    return LLM(
        HelixConfig(
            model=ModelConfig(path=str(path), dtype="float32", max_position=max_position),
            parallel=ParallelConfig(kvp=kvp),
            cache=CacheConfig(block_size=block_size, num_pages=num_pages, **cache),
            scheduler=SchedulerConfig(max_batch=max_batch, prefill_chunk=prefill_chunk),
            runtime=RuntimeConfig(device=device, look_ahead=look_ahead, check_ranks=check_ranks),
        )
    )


def request(prompt: Sequence[int], num_tokens: int = MAX_TOKENS, **sampling: Any) -> Request:
    settings = {"ignore_eos": True, **sampling}
    return Request(prompt_token_ids=list(prompt), sampling=SamplingParams(max_tokens=num_tokens, **settings))


def stopping_requests(plain: Sequence[list[int]], texts: Sequence[str]) -> list[Request]:
    """Requests that all stop elsewhere, given what each prompt makes when nothing stops it."""
    text = texts[1]
    at = next(at for at in range(2, len(text) - 1) if text[at : at + 2].isascii())
    return [
        request(PROMPTS[0]),
        request(PROMPTS[1], stop=[text[at : at + 2]]),
        request(PROMPTS[2], stop_token_ids=[plain[2][3]]),
        request(PROMPTS[3], 1),
        request(PROMPTS[4], 9),
        request(PROMPTS[5], stop_token_ids=[plain[5][0], plain[5][12]]),
        request(PROMPTS[2], stop_token_ids=[plain[2][17]]),
    ]


def texts_of(llm: LLM, outputs: Sequence[RequestOutput]) -> list[str]:
    """The outputs' text, on any rank."""
    return [llm.tokenizer.decode(output.token_ids, skip_special_tokens=True) for output in outputs]


def first_new(token_ids: Sequence[int], least: int) -> int:
    """The first index, at least so large, of a token that does not come before it."""
    return next(at for at in range(least, len(token_ids)) if token_ids[at] not in token_ids[:at])


def events_of(llm: LLM, requests: Sequence[Request]) -> list[tuple[Any, ...]]:
    """Everything that a caller sees, in its order, and that nothing is held afterwards."""
    seen = []
    for event in llm.stream(requests):
        output = event.output
        end = None if output is None else (output.token_ids, output.text, output.finish_reason, output.cached_tokens)
        seen.append((event.index, event.token_ids, event.text, end))
    assert_idle(llm)
    return seen


def assert_idle(llm: LLM) -> None:
    cache = llm.engine.scheduler.cache
    assert not llm.engine.scheduler.has_work
    assert [cache.num_available(rank) for rank in range(llm.layout.kvp)] == [llm.num_pages] * llm.layout.kvp
    assert all(block.pins == 0 for block in cache.blocks.tree.walk())


def counters(llm: LLM) -> dict[str, Any]:
    """The metrics that are no times, and not how full graphs were: a row that is dropped later is no padding."""
    times = ("elapsed_s", "output_tokens_per_s", "ttft_ms", "ttl_ms", "padding_rows")
    metrics = llm.metrics
    counted = {name: value for name, value in metrics.as_dict().items() if name not in times}
    return counted | {"times": (len(metrics.ttft_s), len(metrics.ttl_s))}


def by_request(events: Sequence[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """The events of each request, in their order; what was cached is left out."""
    return [
        [(*event[:3], event[3] and event[3][:3]) for event in events if event[0] == index]
        for index in sorted({event[0] for event in events})
    ]


# --- nothing changes --------------------------------------------------------------------------------------------------


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


def note_ahead(llm: LLM) -> list[Step]:
    """The steps that are launched ahead from now on."""
    original, ahead = llm.engine.scheduler.look_ahead, []

    def look_ahead(launched: Step, **how: bool) -> Step | None:
        step = original(launched, **how)
        if step is not None:
            ahead.append(step)
        return step

    llm.engine.scheduler.look_ahead = look_ahead  # type: ignore[method-assign]
    return ahead


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
    assert len(ahead) == MAX_TOKENS - 9 - 1, "once it has ended"


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


# --- the look-ahead itself --------------------------------------------------------------------------------------------


class Watch:
    """What a runner was asked, in order: ("launch", the batch's spans) and ("wait", the number of that launch)."""

    def __init__(self, llm: LLM) -> None:
        self.log: list[tuple[str, Any]] = []
        self.num_launches = 0
        self._launch = llm.runner.launch
        llm.runner.launch = self.launch  # type: ignore[method-assign]

    def launch(self, chunks: list[Chunk]) -> Any:
        pending, number = self._launch(chunks), self.num_launches
        self.num_launches += 1
        self.log.append(("launch", [(chunk.seq.index, chunk.start, chunk.stop) for chunk in chunks]))
        watch = self

        class Watched(PendingTokens):
            def wait(self) -> tuple[list[int], int]:
                watch.log.append(("wait", number))
                return super().wait()

        return Watched(pending.host, pending.done, pending.rows)


def test_a_step_is_launched_before_the_tokens_of_the_last_are_read(model: Path) -> None:
    llm = make_llm(model, True)
    watch = Watch(llm)
    [output] = llm.generate([request([1, 2], 6)])
    assert len(output.token_ids) == 6, "one from the prompt's step, five from launched ones"
    launches = [("launch", [(0, 0, 2)]), *(("launch", [(0, position, position + 1)]) for position in range(2, 7))]
    first, *others = launches
    order = [each for number, launch in enumerate(others) for each in (launch, ("wait", number))]
    assert watch.log == [first, *order, ("wait", 5)]


def test_a_prompts_chunks_are_launched_before_the_step_before_is_read(model: Path) -> None:
    """Beside rows that decode, and behind the chunk of another prompt that ends with its first token."""
    long = range(200)
    requests = [request(PROMPTS[0], 12), request(long[:100], 3), request(PROMPTS[1], 1), request(long[90:190], 2)]
    off, on = (make_llm(model, look, prefill_chunk=16) for look in (False, True))
    watch = Watch(on)
    assert events_of(on, requests) == events_of(off, requests)
    assert counters(on) == counters(off)
    chunks = [batch for kind, batch in watch.log if kind == "launch"]
    assert sum(any(stop - start > 1 for _, start, stop in batch) for batch in chunks) > 10
    waits = {number: at for at, (kind, number) in enumerate(watch.log) if kind == "wait"}
    launched = [at for at, (kind, _) in enumerate(watch.log) if kind == "launch"]
    assert all(launched[number + 1] < waits[number] for number in range(len(chunks) - 1))


def test_without_the_setting_and_with_checks_nothing_is_launched_ahead(model: Path) -> None:
    for llm in (make_llm(model, False), make_llm(model, True, check_ranks=True)):
        watch = Watch(llm)
        llm.generate([request([1, 2], 6)])
        assert [kind for kind, _ in watch.log] == ["launch", "wait"] * 6


def test_what_a_launched_step_chose_for_a_stopped_sequence_is_never_seen(model: Path) -> None:
    """The stopped row is in the step in flight, and that step's token for it is one that would show."""
    llm = make_llm(model, True)
    [long] = llm.generate([request(PROMPTS[0], 12)])
    other = request(PROMPTS[3], 12)
    [beside] = llm.generate([other])
    watch = Watch(llm)
    at = first_new(long.token_ids, 4)
    stopped, going_on = llm.generate([request(PROMPTS[0], 12, stop_token_ids=[long.token_ids[at]]), other])
    assert stopped.token_ids == long.token_ids[: at + 1]
    assert going_on.token_ids == beside.token_ids
    position = len(PROMPTS[0]) + at  # of the token that stopped it
    rows = [row for kind, batch in watch.log if kind == "launch" for row in batch if row[0] == 0]
    assert rows[-1] == (0, position, position + 1), "it was launched once more"
    assert llm.metrics.tokens_per_rank == [position + len(PROMPTS[3]) + 11]
    assert_idle(llm)


def test_a_stopped_sequence_keeps_its_pages_until_the_step_in_flight_has_ended(model: Path) -> None:
    llm = make_llm(model, True, block_size=1)
    [long] = llm.generate([request(PROMPTS[0], 12)])
    stop = long.token_ids[first_new(long.token_ids, 2)]
    requests = [request(PROMPTS[0], 14, stop_token_ids=[stop]), request(PROMPTS[3], 24)]
    held: list[tuple[bool, int]] = []
    for event in llm.stream(requests):
        running = {seq.index: seq for seq in llm.engine.scheduler.running}
        if event.index == 0 and event.output is not None:
            assert 0 in running and llm.engine._flight is not None and llm.engine._flight.holds(running[0])
            held.append((True, len(running[0].blocks.pages)))
            assert running[0].num_computed == len(running[0].token_ids) - 1
            assert held[-1][1] == len(running[0].token_ids), "with the page of the row that is dropped"
        elif held:
            held.append((0 in running, 0))
    assert held[0][0] and not any(still for still, _ in held[2:])
    assert_idle(llm)


def test_waiting_sequences_that_do_not_fit_hold_nothing_up(model: Path) -> None:
    llm = make_llm(model, True, max_batch=2)
    requests = [request(PROMPTS[0], 10), request(PROMPTS[1], 10), request(PROMPTS[2], 10), request(PROMPTS[3], 10)]
    ahead = note_ahead(llm)
    events_of(llm, requests)
    assert len(ahead) == 2 * 9, "all steps but those of each pair's prompts are launched ahead"


def test_a_stream_that_is_left_early_waits_for_the_step_in_flight_and_keeps_what_was_read(model: Path) -> None:
    llm = make_llm(model, True)
    wanted = events_of(make_llm(model, False), [request(PROMPTS[4], 8)])
    watch = Watch(llm)
    stream = llm.stream([request(PROMPTS[4], 8)])
    seen: list[StreamEvent] = [next(stream) for _ in range(4)]
    assert watch.log[-1] == ("wait", 3) and watch.num_launches == 5
    stream.close()
    assert watch.log[-1] == ("wait", 4)
    assert_idle(llm)
    assert [event.token_ids for event in seen] == [event[1] for event in wanted[:4]]
    made = [token for event in wanted[:5] for token in event[1]]
    again = events_of(llm, [request([*PROMPTS[4], *made], 3)])
    assert [event[1] for event in again] == [event[1] for event in wanted[5:]]
    assert again[-1][3][3] == len(PROMPTS[4]) + 3, "what the last step computed was never read, so it is not cached"


@pytest.mark.parametrize("closed", [False, True])
def test_a_fault_in_any_launched_step_is_raised_and_the_next_call_runs(model: Path, closed: bool) -> None:
    llm = make_llm(model, True)
    [wanted] = llm.generate([request(PROMPTS[4], 8)])

    class Faulty(PendingTokens):
        def wait(self) -> tuple[list[int], int]:
            return super().wait()[0], (7 * 4 + 1) << 8 | 1

    original, launches = llm.runner.launch, 0

    def launch(chunks: list[Chunk]) -> PendingTokens:
        nonlocal launches
        launches += 1
        pending = original(chunks)
        return Faulty(pending.host, pending.done, pending.rows) if launches == 4 else pending

    def check_faults(word: int | None = None) -> None:
        if word:
            raise RankLost(str(word))

    llm.runner.launch, llm.runner.check_faults = launch, check_faults  # type: ignore[method-assign]
    stream = llm.stream([request(PROMPTS[4], 8)])
    with pytest.raises(RankLost):
        for number, _ in enumerate(stream):
            if closed and number == 2:
                stream.close()
    assert launches == (4 if closed else 5), "the step after it was in flight already"
    assert_idle(llm)
    assert llm.generate([request(PROMPTS[4], 8)])[0].token_ids == wanted.token_ids


def test_a_sequence_aborted_in_flight_keeps_its_pages_until_the_step_has_landed(model: Path) -> None:
    expected = make_llm(model, True).generate([request(prompt) for prompt in PROMPTS[:3]])
    llm = make_llm(model, True)
    stream = llm.stream([request(prompt) for prompt in PROMPTS[:3]])
    seen = [next(stream) for _ in range(3 * 4)]
    flight = llm.engine._flight
    assert flight is not None
    dropped = flight.step.chunks[1].seq
    held = list(dropped.blocks.pages)
    [end] = llm.engine.abort(dropped.index)
    assert end.output is dropped.output and end.output.finish_reason == "abort"
    assert dropped in llm.engine.scheduler.running and dropped.blocks.pages == held
    seen += list(stream)
    outputs = {event.index: event.output for event in seen if event.output is not None}
    assert {index: output.token_ids for index, output in outputs.items()} == {
        index: expected[index].token_ids for index in range(3) if index != dropped.index
    }
    assert_idle(llm)
