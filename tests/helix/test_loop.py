"""Where a stop string ends a text, whatever the step had made of its request beyond that."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from helix.commands import Cut
from helix.loop import StepLoop
from helix.request import ERROR, LENGTH, STOP, RequestOutput, StreamEvent

ENDS = [
    (RequestOutput(None, [5, 6, 7, 8], finish_reason=LENGTH), [[6], [7], [8]]),
    (RequestOutput(None, [5, 6, 7, 8], finish_reason=ERROR, error="no token can go on"), [[6], [7], [8], []]),
]


@pytest.mark.parametrize("num_tokens", [2, 3, 4])
@pytest.mark.parametrize(("output", "made"), ENDS, ids=["length", "stuck"])
def test_a_stop_string_takes_back_what_came_after_it_in_the_same_step(
    output: RequestOutput, made: list[list[int]], num_tokens: int
) -> None:
    output = copy.deepcopy(output)
    noted: list[tuple[Any, ...]] = []
    front: Any = SimpleNamespace(metrics=SimpleNamespace(note_cut=lambda *cut: noted.append(cut)))
    reason = output.finish_reason
    events = [StreamEvent(0, ids, "") for ids in made]
    events[-1].output = output
    other = StreamEvent(1, [9], "x")
    loop = StepLoop(front, None, None)  # type: ignore[arg-type]
    left = loop._cut(Cut(0, num_tokens, "stop"), [*events, other])
    assert [event.token_ids for event in left] == [*([token] for token in [6, 7, 8][: num_tokens - 1]), [9]]
    assert left[-2].output is output and all(event.output is None for event in left[:-2])
    assert (output.token_ids, output.finish_reason) == ([5, 6, 7, 8][:num_tokens], STOP)
    assert (output.stop_reason, output.error) == ("stop", None)
    assert noted == [(reason, 4 - num_tokens)]
