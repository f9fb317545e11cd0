"""Each row of the table of fields, over HTTP: what a value makes of the request, or how it is refused."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

from helix.commands import Add
from helix.fields import CHAT, FIELDS
from helix.sampling import SamplingParams
from helix.serving.errors import as_written
from scripts.make_checkpoint import make_checkpoint
from tests.helix.serving.fake_world import FakeWorld, serving

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeWorld]:
    model = make_checkpoint(tmp_path_factory.mktemp("fields") / "model", layers=1)
    with serving(model, max_priority=50, max_retention_s=10) as world:
        yield world


class Case(NamedTuple):
    """A value, and what it makes: settings of the request, or other attributes of the command, or of the answer."""

    value: Any
    settings: dict[str, Any] | None = None
    add: dict[str, Any] | None = None
    answer: Any = None
    with_fields: dict[str, Any] | None = None


def ids(text: str) -> bytes:
    return b"".join(byte.to_bytes(4, "little") for byte in text.encode())


HONOURED: dict[str, Case] = {
    "model": Case("fake", answer=lambda each: each["model"] == "fake"),
    "prompt": Case("other", add={"token_ids": ids("other")}),
    "messages": Case([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], add={}),
    "max_tokens": Case(7, {"max_tokens": 7}),
    "max_completion_tokens": Case(7, {"max_tokens": 7}),
    "max_new_tokens": Case(7, {"max_tokens": 7}),
    "n": Case(3, answer=lambda each: [choice["index"] for choice in each["choices"]] == [0, 1, 2]),
    "stream": Case(False, answer=lambda each: each["object"] == "text_completion"),
    "stream_options": Case({"include_usage": True}, answer=lambda each: each["usage"]["completion_tokens"] == 1),
    "temperature": Case(0.5, {"temperature": 0.5}),
    "top_p": Case(0.5, {"top_p": 0.5}),
    "top_k": Case(-1, {"top_k": 0}),
    "min_p": Case(0.1, {"min_p": 0.1}),
    "repetition_penalty": Case(1.5, {"repetition_penalty": 1.5}),
    "presence_penalty": Case(0.5, {"presence_penalty": 0.5}),
    "frequency_penalty": Case(0.5, {"frequency_penalty": 0.5}),
    "seed": Case(9, {"seed": 9}, {"seed": 9}),
    "stop": Case("x", {"stop": ["x"]}),
    "stop_token_ids": Case([5], {"stop_token_ids": [5]}),
    "ignore_eos": Case(True, {"ignore_eos": True}),
    "logprobs": Case(2, {"logprobs": 2}),
    "top_logprobs": Case(3, {"logprobs": 3}, with_fields={"logprobs": True}),
    "echo": Case(True, answer=lambda each: each["choices"][0]["text"] == "hian answer"),
    "prompt_logprobs": Case(2, {"prompt_logprobs": 2}),
    "cache_salt": Case("s", add={"cache_salt": "s"}),
    "retention": Case({"priority": 40, "duration_s": 9}, add={"retention": None}),
    "priority": Case(5, add={"priority": 5}),
    "min_tokens": Case(2, {"min_tokens": 2}),
    "logit_bias": Case({"65": 2.5}, {"logit_bias": {65: 2.5}}),
    "bad_words": Case(["x"], add={"bad_word_ids": None}),
    "include_stop_str_in_output": Case(True, {"include_stop_str_in_output": True}),
    "skip_special_tokens": Case(False, {"skip_special_tokens": False}),
    "structured_outputs": Case({"regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
    "response_format": Case({"type": "json_object"}, {"structured_outputs": {"json": '{"type": "object"}'}}),
    "return_token_ids": Case(True, answer=lambda each: each["choices"][0]["token_ids"] == [1]),
    "request_id": Case("mine", add={}),
    "chat_template_kwargs": Case({"enable_thinking": False}, add={}),
    "add_generation_prompt": Case(False, add={"prompt_len": 5}),
    "continue_final_message": Case(True, add={"prompt_len": 4}),
    "documents": Case([{"text": "d"}], add={}),
    "tools": Case([TOOL], add={}, with_fields={"tool_choice": "none"}),
    "tool_choice": Case("auto", add={}),
}
REFUSED_VALUE: dict[str, Any] = {
    "best_of": 2, "functions": [TOOL],
}  # fmt: skip
ROWS = [(each.name, place) for each in FIELDS for place in each.at]


def plain(place: str) -> dict[str, Any]:
    return {"messages": HI} if place == CHAT else {"prompt": "hi"}


@pytest.mark.parametrize(("name", "place"), ROWS)
def test_a_field_does_what_the_table_says(world: FakeWorld, name: str, place: str) -> None:
    path = "/v1/chat/completions" if place == CHAT else "/v1/completions"
    row = next(each for each in FIELDS if each.name == name)
    if row.effect == "400":
        status, answer, _ = world.ask(path, plain(place) | {name: REFUSED_VALUE.get(name, "something")})
        assert (status, answer["error"]["param"]) == (400, name)
        for value in (*row.neutral, None):
            assert world.ask(path, plain(place) | {name: value})[0] == 200
        return
    if row.effect == "ignored":
        assert world.ask(path, plain(place) | {name: "whatever"})[0] == 200
        assert settings_of(world) == settings_of(world, asked=plain(place), path=path)
        return
    value, settings, add, answer, others = HONOURED[name]
    if place == CHAT and name == "logprobs":
        value, settings = True, {"logprobs": 0}
    status, reply, _ = world.ask(path, plain(place) | {name: value} | (others or {}))
    assert status == 200, reply
    last = world.adds[-1]
    for setting, wanted in (settings or {}).items():
        found = getattr(last.sampling, setting)
        assert (found[: len(wanted)] if setting == "stop_token_ids" else found) == wanted
    for attribute, wanted in (add or {}).items():
        assert getattr(last, attribute) == wanted if wanted is not None else getattr(last, attribute)
    if answer is not None and not (place == CHAT and name == "stream"):
        assert answer(reply)
    if name in plain(place):
        return
    world.ask(path, plain(place) | {name: None})
    assert settings_of(world) == settings_of(world, asked=plain(place), path=path)


def settings_of(world: FakeWorld, asked: dict[str, Any] | None = None, path: str = "") -> Any:
    """Return the last request but for its names and seed, after asking one where it is given."""
    if asked is not None:
        world.ask(path, asked)
    add = msgspec.structs.replace(world.adds[-1], index=0, seed=0)
    assert isinstance(add, Add) and isinstance(add.sampling, SamplingParams)
    return add


def test_priority_and_retention_have_the_servers_bounds(world: FakeWorld) -> None:
    for bad in (
        {"priority": 51},
        {"priority": 1.5},
        {"retention": {"priority": 40}},
        {"retention": {"priority": 40, "duration_s": 11}},
    ):
        status, answer, _ = world.ask("/v1/completions", plain("completions") | bad)
        assert (status, answer["error"]["param"]) == (400, next(iter(bad)))
    assert world.ask("/v1/completions", plain("completions") | {"priority": 5.0})[0] == 200
    assert type(world.adds[-1].priority) is int


def test_what_is_too_long_has_the_code_that_clients_know(world: FakeWorld) -> None:
    for path, asked, param in (
        ("/v1/completions", {"prompt": "a" * 1000}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 1000}]}, "messages"),
        ("/v1/completions", {"prompt": "a" * 990, "max_tokens": 11}, "max_tokens"),
    ):
        status, answer, _ = world.ask(path, asked)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, "context_length_exceeded")


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"min_tokens": 17}, "min_tokens", "min_tokens = 17 must be at most max_tokens = 16"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens", "min_tokens = 9 must be at most max_tokens = 5"),
        (
            {"min_tokens": 9, "max_completion_tokens": 5},
            *("min_tokens", "min_tokens = 9 must be at most max_completion_tokens = 5"),
        ),
        ({"max_new_tokens": 0}, "max_new_tokens", "max_new_tokens = 0 must lie in [1, 2**31)"),
        ({"max_new_tokens": 1000}, "max_new_tokens", "max_new_tokens = 1000 and a prompt of 2 tokens exceed"),
        ({"temperature": -1}, "temperature", "temperature = -1 must be"),
        ({"stop": ["sampling.stop", ""]}, "stop", "stop = ['sampling.stop', ''] must not contain an empty string"),
    ],
    ids=str,
)
def test_a_refusal_names_fields_as_the_client_wrote_them(
    world: FakeWorld, asked: dict[str, Any], param: str, message: str
) -> None:
    status, answer, _ = world.ask("/v1/completions", plain("completions") | asked)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(message)


def test_a_refusal_names_the_length_as_the_client_wrote_it_in_its_middle_too() -> None:
    said = as_written(ValueError("2 prompt tokens and sampling.max_tokens = 9 need more"), "max_new_tokens")
    assert said == "2 prompt tokens and max_new_tokens = 9 need more"


def test_two_names_of_one_field_must_agree(world: FakeWorld) -> None:
    asked = plain(CHAT) | {"max_tokens": 3}
    assert world.ask("/v1/chat/completions", asked | {"max_completion_tokens": 3})[0] == 200
    assert world.ask("/v1/chat/completions", asked | {"max_completion_tokens": 4})[0] == 400


def test_a_prompt_is_a_text_ids_or_lists_of_either(world: FakeWorld) -> None:
    for prompt, wanted in (
        ("ab", ["ab"]), ([97, 98], ["ab"]), (["a", "b"], ["a", "b"]), ([[97], [98]], ["a", "b"]),
        (["a", [98]], ["a", "b"]),
    ):  # fmt: skip
        before = len(world.adds)
        assert world.ask("/v1/completions", {"prompt": prompt})[0] == 200
        assert [add.token_ids for add in world.adds[before:]] == [ids(each) for each in wanted]
    for prompt in ([], "", [[]], [1.5], 5, {}, ["a", 5], [None]):
        assert world.ask("/v1/completions", {"prompt": prompt})[0] == 400, prompt


def test_a_seed_gives_each_answer_one_of_its_own(world: FakeWorld) -> None:
    world.ask("/v1/completions", {"prompt": "a", "n": 3, "seed": 2**63 - 2})
    assert [add.seed for add in world.adds[-3:]] == [2**63 - 2, 2**63 - 1, 0]


def test_a_chat_takes_what_fits_and_a_completion_sixteen(world: FakeWorld) -> None:
    world.ask("/v1/chat/completions", {"messages": HI})
    assert world.adds[-1].max_len == 1000
    world.ask("/v1/completions", {"prompt": "hi"})
    assert world.adds[-1].max_len == 18


def test_the_default_lengths_of_other_fields_hold_for_both(world: FakeWorld) -> None:
    status, answer, _ = world.ask("/v1/chat/completions", {"messages": HI, "max_tokens": 1000})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert "max_tokens = 1000 and a prompt of 6 tokens exceed the model's 1000 tokens" in answer["error"]["message"]
