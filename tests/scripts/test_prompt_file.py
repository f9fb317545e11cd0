"""Files of prompts as people and other tools write them: what a line becomes, and which one fails alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helix.request import Request
from helix.sampling import SamplingParams
from scripts.prompt_file import parse_item, parse_line, read_requests


def request_of(line: str | dict[str, Any], sampling: SamplingParams | None = None) -> Request:
    content = parse_line(line) if isinstance(line, str) else line
    return parse_item(content, "in.jsonl, line 9", sampling or SamplingParams())


LINE_KEYS = "the keys are prompt, prompt_token_ids, messages, id, sampling"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
        ('{"prompt": "a"} x', "not JSON: Extra data (column 17)"),
        ('{"prompt": "a", "temperature": NaN}', "sampling.temperature = nan must be 0 (greedy) or lie in "),
        ("[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        ('"text"', "a str where an object is expected"),
        ("[1]", "a list where an object is expected"),
        ('{"promt": "a"}', f"'promt' is not a key; {LINE_KEYS}"),
        ('{"prompt": 5}', "prompt is a int, must be a string"),
        (
            '{"prompt": "\\ud800"}',
            "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
        ),
        ('{"prompt_token_ids": "1 2"}', "prompt_token_ids must be a list of integers"),
        ('{"prompt_token_ids": [1, 2.0]}', "prompt_token_ids must be a list of integers"),
        ('{"prompt_token_ids": [true]}', "prompt_token_ids must be a list of integers"),
        ('{"messages": {"role": "user"}}', 'messages must be a list of objects {"role": ..., "content": ...}'),
        ('{"messages": ["hi"]}', 'messages must be a list of objects {"role": ..., "content": ...}'),
        ('{"prompt": "a", "sampling": 3}', "sampling is a int, must be an object"),
        ('{"prompt": "a", "sampling": {"max_tokens": 0}}', "sampling.max_tokens = 0 must lie in [1, 2**31)"),
        ('{"prompt": "a", "sampling": {"max_token": 1}}', "sampling.max_token is not a setting; valid settings: "),
        (
            '{"prompt": "a", "sampling": {"temperature": NaN}}',
            "sampling.temperature = nan must be 0 (greedy) or lie in ",
        ),
    ],
)
def test_a_line_that_is_no_request_carries_its_error(line: str, message: str) -> None:
    request = request_of(line)
    assert request.error is not None
    assert request.error.startswith("in.jsonl, line 9: " + message)


def test_a_line_becomes_a_request_with_its_own_settings_over_the_runs() -> None:
    given = SamplingParams(max_tokens=50, temperature=0.5)
    messages = [{"role": "user", "content": "hi"}]
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "sampling": {"max_tokens": 3, "stop": "x"}},
        {"prompt_token_ids": [1, 2], "id": "mine"},
        {"messages": messages, "id": 12},
    ]
    assert [request_of(json.dumps(line), given) for line in lines] == [
        Request(prompt="a", sampling=SamplingParams(max_tokens=3, temperature=0.5, stop=["x"])),
        Request(prompt_token_ids=[1, 2], sampling=given, id="mine"),
        Request(messages=messages, sampling=given, id="12"),
    ]


def requests_of(file: Path) -> list[Request]:
    return read_requests(str(file), SamplingParams())


def test_line_numbers_count_blank_lines_and_nothing_but_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    text = "one\u2028two\x85three"
    lines = [
        "",
        json.dumps({"prompt": text}, ensure_ascii=False) + "\r",
        "   ",
        "nonsense",
        json.dumps({"prompt": "b"}),
    ]
    file.write_bytes("\n".join(lines).encode())
    first, bad, last = requests_of(file)
    assert (first.prompt, first.error, last.prompt) == (text, None, "b")
    assert bad.error == f"{file}, line 4: not JSON: Expecting value (column 1)"


MARKED = ["utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", ["utf-8", *MARKED])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_of_any_editor_reads_alike(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(['{"prompt": "naïve 模型"}', "", '{"prompt": "b"}', ""])
    (tmp_path / "in.jsonl").write_bytes(text.encode(encoding))
    assert [(each.prompt, each.error) for each in requests_of(tmp_path / "in.jsonl")] == [
        ("naïve 模型", None),
        ("b", None),
    ]


ITEMS: list[dict[str, Any]] = [{"prompt": "a", "id": "x"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    "written",
    [
        lambda items: json.dumps(items),
        lambda items: "\n" + json.dumps(items, indent=2) + "\n",
        lambda items: "\n".join(json.dumps(item, indent=2) for item in items),
    ],
    ids=["array", "pretty array", "pretty objects"],
)
def test_an_array_or_objects_over_several_lines_are_read_as_items(
    tmp_path: Path, written: Callable[[Any], str]
) -> None:
    (tmp_path / "in.json").write_text(written([*ITEMS, {"promt": "c"}]))
    first, second, bad = requests_of(tmp_path / "in.json")
    assert [(first.prompt, first.id), (second.prompt, second.error)] == [("a", "x"), ("b", None)]
    assert str(bad.error).startswith(f"{tmp_path}/in.json, item 3: 'promt' is not a key")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n  \n", "has no prompts; give one JSON object a line"),
        (b"[]", "has no prompts"),
        (b"", "has no prompts"),
        ("{}".encode("utf-16-le"), "holds zero bytes: save it as UTF-8, or as UTF-16 with a byte order mark"),
        (b"\xff\xfe{\x00\x00", "is not the utf-16 text that it begins as"),
        (b"\x1f\x8b\x08", "is a gzip file; unpack it into JSON lines"),
        (b"PAR1", "is a Parquet file"),
    ],
)
def test_a_file_that_is_none_of_prompts_is_named_for_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        requests_of(tmp_path / "in.jsonl")
    assert str(refused.value).startswith(f"prompts = {tmp_path}/in.jsonl {message}")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        requests_of(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        requests_of(tmp_path)


def test_a_line_of_another_encoding_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "na\xefve"}\n{"prompt": "c"}')
    first, bad, last = requests_of(tmp_path / "in.jsonl")
    assert (first.prompt, last.prompt) == ("a", "c")
    assert str(bad.error).startswith(f"{tmp_path}/in.jsonl, line 2: not UTF-8 text: ")


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0.5}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": CHAT},
            Request(id="c1", messages=CHAT["messages"], sampling=SamplingParams(max_tokens=5, temperature=0.5)),  # type: ignore[arg-type]
        ),
        (
            {
                "custom_id": 2,
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "m", "prompt": ["hi"], "stop": "x"},
            },
            Request(id="2", prompt="hi", sampling=SamplingParams(stop=["x"])),
        ),
        (
            {**CHAT, "max_completion_tokens": 5},
            Request(messages=CHAT["messages"], sampling=SamplingParams(max_tokens=5, temperature=0.5)),
        ),  # type: ignore[arg-type]
        ({"prompt": [1, 2], "seed": 3}, Request(prompt_token_ids=[1, 2], sampling=SamplingParams(seed=3))),
        (
            {"prompt": "a", "logprobs": True, "top_logprobs": 2},
            Request(prompt="a", sampling=SamplingParams(logprobs=2)),
        ),
        ({"prompt": "a", "logprobs": True}, Request(prompt="a", sampling=SamplingParams(logprobs=0))),
        ({"prompt": "a", "logprobs": False}, Request(prompt="a", sampling=SamplingParams())),
        (
            {
                "prompt": "a",
                "best_of": 1,
                "echo": False,
                "logit_bias": {},
                "tools": [],
                "user": "u",
                "stream": True,
                "response_format": {"type": "text"},
            },
            Request(prompt="a", sampling=SamplingParams()),
        ),
        (
            dict.fromkeys(
                (
                    "prompt_token_ids",
                    "messages",
                    "id",
                    "sampling",
                    "cache_salt",
                    "retention",
                    "stop",
                    "tools",
                    "max_tokens",
                    "top_p",
                ),
                None,
            )
            | {"prompt": "a"},
            Request(prompt="a", sampling=SamplingParams()),
        ),
        (
            {"prompt": "a", "max_tokens": 4, "sampling": {"max_tokens": 4, "seed": 1}},
            Request(prompt="a", sampling=SamplingParams(max_tokens=4, seed=1)),
        ),
        ({"prompt": "a", "n": 1}, Request(prompt="a", sampling=SamplingParams())),
        (
            {"prompt": "a", "max_tokens": 4.0, "top_k": -1, "temperature": 1e-6, "priority": 3.0},
            Request(prompt="a", priority=3, sampling=SamplingParams(max_tokens=4, top_k=0, temperature=0.0)),
        ),
        (
            {"prompt": "a", "sampling": {"max_tokens": 4.0, "top_p": None, "seed": None, "n": 1}},
            Request(prompt="a", sampling=SamplingParams(max_tokens=4)),
        ),
    ],
)
def test_lines_of_other_programs_mean_what_they_mean_there(line: dict[str, Any], expected: Request) -> None:
    assert request_of(line) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"custom_id": "c", "method": "POST", "url": "/v1/embeddings", "body": {}},
            "POST /v1/embeddings is not answered",
        ),
        (
            {"custom_id": "c", "url": "/v1/completions", "body": [1]},
            "a line with a body takes custom_id, method, url, body",
        ),
        ({"prompt": "a", "body": {}}, "a line with a body takes"),
        ({"prompt": "a", "n": 2}, "n = 2 is not supported; leave it out"),
        ({"prompt": "a", "best_of": 2}, "best_of = 2 is not supported: ask for n; leave it out"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format must be"),
        (
            {"prompt": "a", "max_tokens": 4, "sampling": {"max_tokens": 5}},
            "max_tokens is given twice, once in sampling",
        ),
        ({"prompt": "a", "max_tokens": 4, "max_completion_tokens": 5}, "max_tokens is given twice, once as max_comp"),
        ({"prompt": "a", "id": "a", "custom_id": "b"}, "id is given twice, once as custom_id"),
        ({"prompt": ["a", "b"]}, "prompt holds 2 prompts; give each a line of its own"),
        ({"prompt": "a", "priority": "high"}, "priority = 'high' must be an integer in -100..100"),
        ({"prompt": "a", "top_logprobs": 2}, "top_logprobs = 2 needs logprobs = true"),
        ({"prompt": "a", "id": [1]}, "id is a list, must be a string or a number"),
        ({"prompt": "a", "error": "x"}, "'error' is not a key"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(line: dict[str, Any], message: str) -> None:
    assert str(request_of(line).error).startswith(f"in.jsonl, line 9: {message}")


def test_keys_without_effect_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(CHAT | {"user": "u"}) for _ in range(3)))
    with caplog.at_level("INFO"):
        requests_of(tmp_path / "in.jsonl")
    assert [record.getMessage() for record in caplog.records] == [
        f"prompts: model, user in {tmp_path}/in.jsonl changes nothing here"
    ]
