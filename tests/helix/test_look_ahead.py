"""Steps that are launched before the tokens of the last are read: when they are, and what becomes of them."""

from pathlib import Path
from typing import Any

import pytest

from helix import LLM
from helix.graphs import PendingTokens
from helix.lost import RankLost
from helix.request import Chunk, StreamEvent
from scripts.make_checkpoint import make_checkpoint
from tests.helix.launched import PROMPTS, assert_idle, counters, events_of, first_new, make_llm, note_ahead, request


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("look_ahead") / "model", layers=1)


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

        return Watched(pending.host, pending.done, pending.rows, pending.sampled)


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
