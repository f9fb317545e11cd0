"""What an output line holds, and what becomes of lines that cannot be written."""

import json
from pathlib import Path

from helix.request import RequestOutput, TokenLogprobs
from helix.sampling import SamplingParams
from scripts.generate import output_line
from scripts.outputs import write_text
from scripts.prompt_file import parse_item
from tests.scripts.generate.job import SMALL, Command, Ended, outputs_in, write_lines


def test_a_line_that_repeats_an_id_fails_alone_and_names_the_first_with_it(model: Path, command: Command) -> None:
    write_lines(
        Path("in.jsonl"),
        {"prompt": "a", "id": "x"},
        {"prompt": "b", "id": "0"},
        {"prompt": "c"},
        "",
        {"prompt": "d", "id": "x"},
        {"prompt": "e", "id": 2},
        {"prompt": "f", "id": "6"},
        {"prompt": "g"},
        {"prompt": "", "id": "x"},
        "{",
    )
    ended = command(f"model.path={model}", "prompts=in.jsonl", "sampling.max_tokens=2", *SMALL)
    assert ended.code is None
    outputs = outputs_in(ended.out)
    own = "give every line an id of its own"
    assert [(output["id"], output.get("error")) for output in outputs] == [
        ("x", None),
        ("0", None),
        ("2", None),
        ("x", f'in.jsonl, line 5: id "x" is that of line 1; {own}'),
        ("2", f'in.jsonl, line 6: id "2" is that of line 3; {own}'),
        ("6", None),
        ("6", f'in.jsonl, line 8: its id, "6" by default, is that of line 7; {own}'),
        ("x", f'in.jsonl, line 9: id "x" is that of line 1; {own}'),
        ("8", "in.jsonl, line 10: not JSON: Expecting property name enclosed in double quotes (column 2)"),
    ]
    assert [output["finish_reason"] for output in outputs] == [
        "error" if "error" in output else "length" for output in outputs
    ]


def test_an_output_line_holds_every_field_and_reads_back() -> None:
    output = RequestOutput(
        None,
        token_ids=[3, 4],
        text="a\n\u2028ä",
        finish_reason="stop",
        prompt_tokens=7,
        cached_tokens=5,
        logprobs=[TokenLogprobs(3, -0.5, {3: -0.5, 9: -2.0}), TokenLogprobs(4, -0.25, {})],
    )
    line = output_line(output, 6, "0123")
    assert "\n" not in line
    assert "ä" in line
    assert json.loads(line) == {
        "id": "6",
        "token_ids": [3, 4],
        "text": "a\n\u2028ä",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "cached_tokens": 5,
        "logprobs": [
            {"token_id": 3, "logprob": -0.5, "top": {"3": -0.5, "9": -2.0}},
            {"token_id": 4, "logprob": -0.25, "top": {}},
        ],
        "hash": "0123",
    }
    failed = json.loads(output_line(RequestOutput("me", finish_reason="error", error="why"), 6, "0123"))
    assert (failed["id"], failed["error"], "logprobs" in failed, "hash" in failed) == ("me", "why", False, False)


def test_an_id_that_is_no_text_comes_back_and_spoils_no_file(tmp_path: Path) -> None:
    request = parse_item({"id": "\ud800", "prompt": "a"}, "here", SamplingParams())
    write_text(str(tmp_path / "out.jsonl"), output_line(RequestOutput(request.id), 0, ""))
    assert json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["id"] == "\ud800"


FULL = "cannot be written (No space left on device)"


def failure(ended: Ended) -> str:
    """The message of a run that failed as it should; log lines and what is printed instead may stand before it."""
    assert ended.code == 1
    assert "Traceback" not in ended.err
    return ended.err.splitlines()[-1]


def test_lines_that_cannot_be_written_are_printed_and_the_run_says_that_it_failed(
    model: Path, command: Command
) -> None:
    given = (f"model.path={model}", "prompt=hello", "sampling.max_tokens=2", *SMALL)
    ended = command(*given, "output=/dev/full", "metrics=metrics.json")
    assert failure(ended) == f"error: output = /dev/full {FULL}; what it was to hold is on standard output"
    assert ended.out == command(*given).out
    assert json.loads(Path("metrics.json").read_text())["output_tokens"] == 2


def test_metrics_that_cannot_be_written_spoil_no_output(model: Path, command: Command) -> None:
    given = (f"model.path={model}", "prompt=hello", "sampling.max_tokens=2", *SMALL)
    ended = command(*given, "metrics=/dev/full")
    assert failure(ended) == f"error: metrics = /dev/full {FULL}; what it was to hold is on standard error"
    assert '"output_tokens": 2,' in ended.err
    assert ended.out == command(*given).out


def test_events_that_cannot_be_written_end_no_run_but_make_it_fail(model: Path, command: Command) -> None:
    given = (f"model.path={model}", "prompt=hello", "sampling.max_tokens=20", *SMALL)
    ended = command(*given, "cache.events=/dev/full")
    assert failure(ended) == f"error: cache.events = /dev/full {FULL}; it lacks events"
    assert ended.err.count("it lacks events from now on") == 1
    assert ended.out == command(*given).out
