"""Events as they come, callbacks, counters, and prompts that are prepared as they may start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import helix.feed
from helix import LLM, Request, RequestOutput
from scripts.make_checkpoint import EOS_ID
from tests.helix.llm.small import PROMPTS, assert_idle, drawn, greedy, make_llm, one, told


def test_streamed_events_joined_are_the_outputs_of_generate(llm: LLM) -> None:
    full = one(llm, PROMPTS[0], greedy(30))
    stop = next(char for char in full.text[3:] if char.isascii())
    requests = [
        Request(prompt_token_ids=prompt, sampling=sampling, id=name)
        for prompt, sampling, name in (
            (PROMPTS[0], greedy(30, stop=[stop, full.text[:3] + "?"]), "stop string"),
            (PROMPTS[1], drawn(40, 3, logprobs=1), "drawn"),
            ([], None, "bad"),
            (PROMPTS[2], greedy(1), "short"),
            (PROMPTS[3], greedy(40, stop_token_ids=[EOS_ID]), "long"),
        )
    ]
    expected = llm.generate(requests)
    events = list(llm.stream(requests))
    assert [output.finish_reason for output in expected] == ["stop", "length", "error", "length", "length"]
    for index, output in enumerate(expected):
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == output.token_ids
        assert "".join(event.text for event in mine) == output.text
        assert [event.output for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert told([event.output for event in mine[-1:] if event.output]) == told([output])
    order = [event.index for event in events]
    assert order.index(4) < len(order) - order[::-1].index(1) - 1, "tokens come as they are made, side by side"


def test_a_second_stream_is_refused_while_one_is_open(llm: LLM) -> None:
    first = llm.stream(PROMPTS[:1], greedy(6))
    next(first)
    with pytest.raises(RuntimeError, match="another stream of this LLM is open"):
        llm.generate(PROMPTS[1:2], greedy(2))
    assert [event.output for event in first][-1] is not None


def test_a_stream_that_is_left_early_frees_everything_it_held(llm: LLM) -> None:
    before = told(llm.generate(PROMPTS, greedy(10)))
    for wanted in (0, 1, 8):
        stream = llm.stream([*PROMPTS, *PROMPTS], greedy(100))
        for _ in range(wanted):
            next(stream)
        assert llm.engine.scheduler.has_work == (wanted > 0)
        stream.close()
        assert_idle(llm)
        assert told(llm.generate(PROMPTS, greedy(10))) == before


def test_metrics_count_what_was_done(path: Path) -> None:
    llm = make_llm(path)
    steps: list[int] = []
    outputs = llm.generate([*PROMPTS, []], greedy(9), on_step=lambda metrics: steps.append(metrics.decode_tokens))
    metrics = llm.metrics.as_dict()
    prompt_tokens = sum(map(len, PROMPTS))
    assert (metrics["requests"], metrics["errors"], metrics["preemptions"]) == (6, 1, 0)
    assert (metrics["prefill_tokens"], metrics["output_tokens"]) == (prompt_tokens, 45)
    assert metrics["tokens_per_kvp_rank"] == [prompt_tokens + 45 - 5], "the last token of a sequence is never stored"
    assert (len(llm.metrics.ttft_s), len(llm.metrics.ttl_s)) == (5, 40)
    assert metrics["steps"] == len(steps)
    assert (steps, steps[-1]) == (sorted(steps), 45)
    assert metrics["output_tokens_per_s"] == pytest.approx(45 / metrics["elapsed_s"])
    assert outputs[-1].error == "the prompt is empty; give at least one token"
    assert llm.generate([]) == []
    assert (llm.metrics.num_requests, llm.metrics.decode_tokens) == (0, 0), "counted anew for every call"
    assert_idle(llm)


def callbacks_body(path: Path) -> tuple[list[list[int]], list[int]]:
    """Tokens, and how often a progress function and a listener were called that raise on rank 1 alone."""
    llm, calls = make_llm(path, kvp=2), [0, 0]

    def call(number: int) -> None:
        calls[number] += 1
        if llm.launch.rank == 1:
            raise RuntimeError("the terminal is gone")

    llm.listen(lambda event: call(0))
    outputs = llm.generate(PROMPTS, greedy(6), on_step=lambda metrics: call(1))
    assert_idle(llm)
    return [output.token_ids for output in outputs], calls


def test_what_a_callback_raises_on_one_rank_ends_no_run_and_is_called_no_more(
    ranks: Callable[[int], Any], llm: LLM, path: Path
) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(6))]
    (tokens, calls), (other_tokens, other_calls) = ranks(2).run(callbacks_body, path)
    assert tokens == other_tokens == expected
    assert min(calls) > 5 and other_calls == [1, 1]


def test_what_a_callback_raises_is_logged_with_its_traceback(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    def broken(metrics: Any) -> None:
        raise ValueError("no such column")

    assert one_with_progress(llm, broken).finish_reason == "length"
    [record] = [record for record in caplog.records if record.name == "helix.callbacks"]
    assert "broken" in record.message and "is called no more" in record.message
    assert record.exc_info and "no such column" in str(record.exc_info[1])


def one_with_progress(llm: LLM, on_step: Callable[[Any], None]) -> RequestOutput:
    (output,) = llm.generate([PROMPTS[0]], greedy(4), on_step=on_step)
    return output


def test_prompts_are_prepared_as_they_may_start_and_not_all_at_first(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[index, *range(50)] for index in range(40)]
    expected = told(llm.generate(prompts, greedy(3)))
    prepare, prepared, events = llm.preparer.prepare, list[int](), list[Any]()
    monkeypatch.setattr(llm.preparer, "prepare", lambda index, *args: prepared.append(index) or prepare(index, *args))
    monkeypatch.setattr(helix.feed, "PREPARED_TOKENS", 150)
    for event in llm.stream([*prompts, []], greedy(3)):
        if not events:
            assert len(prepared) <= 5, "150 tokens are enough for the first steps"
        events.append(event)
    assert prepared == list(range(41))
    outputs = {event.index: event.output for event in events if event.output is not None}
    assert told([outputs[index] for index in range(40)]) == expected
    assert outputs[40].error is not None
