"""The HTTP side before a scripted world: parts of answers, limits, and how it ends."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers.utils.chat_parsing.response_templates import load_response_template

from helix.commands import Add, Close
from helix.grammar.compiling import GrammarCompiler
from helix.prompts import PromptReader
from helix.request import Request
from helix.sampling import SamplingParams
from helix.serving import preparing, wire
from helix.serving.config import ServingConfig
from helix.serving.forced_calls import forced_call
from helix.serving.framing import pack
from helix.serving.process import run
from scripts.make_checkpoint import make_checkpoint
from tests.helix.serving.fake_world import FakeWorld, at_once, never, read_until, request_of, serving

HI = [{"role": "user", "content": "hi"}]


TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": "\\s*<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}]


CHAT = "/v1/chat/completions"


COMPLETE = "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("http") / "model", layers=1)


# --- parts of an answer -----------------------------------------------------------------------------------------------


CALLS = "\n".join(f'<call>{{"name": "add", "arguments": {{"a": {number}}}}}</call>' for number in (2, 3))


SAID = "<think>two and two</think>It is " + CALLS


@pytest.fixture(scope="module")
def parsing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeWorld]:
    file = tmp_path_factory.mktemp("template") / "template.json"
    file.write_text(json.dumps(TEMPLATE))

    def letter_by_letter(world: FakeWorld, add: Add) -> None:
        said = "<call>{broken</call> rest" if len(world.adds) > 2 else SAID
        for letter in said:
            world.delta(add, letter)
        world.delta(add, "", "stop")

    with serving(model, letter_by_letter, response_template=str(file)) as world:
        yield world


def test_reasoning_content_and_calls_come_apart_whole_and_streamed(parsing: FakeWorld) -> None:
    asked = {"messages": HI, "tools": TOOLS}
    [choice] = parsing.ask(CHAT, asked)[1]["choices"]
    message = choice["message"]
    assert (message["reasoning"], message["content"]) == ("two and two", "It is")
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [{"a": 2}, {"a": 3}]
    assert choice["finish_reason"] == "tool_calls" and len({call["id"] for call in message["tool_calls"]}) == 2
    assert not parsing.adds[-1].sampling.skip_special_tokens

    choices = [event["choices"][0] for event in parsing.stream(CHAT, asked)]
    deltas = [each["delta"] for each in choices]
    assert "".join(each.get("reasoning", "") for each in deltas) == "two and two"
    assert "".join(each.get("content") or "" for each in deltas).strip() == "It is"
    calls = [call for each in deltas for call in each.get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "add"), (1, "add")]
    assert choices[-1]["finish_reason"] == "tool_calls"

    [choice] = parsing.ask(CHAT, asked)[1]["choices"]  # what is no call stays content
    assert "{broken" in choice["message"]["content"] and choice["finish_reason"] == "stop"


def test_a_forced_call_is_the_form_of_the_answer(parsing: FakeWorld) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    for choice in ("required", named):
        assert parsing.ask(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": choice})[0] == 200
        form = json.loads(parsing.adds[-1].sampling.structured_outputs["call"])
        assert (form["begin"], form["end"]) == ("<call>", "</call>")
        [call] = form["schema"]["anyOf"]
        assert call["properties"] == {"name": {"const": "add"}, "arguments": TOOLS[0]["function"]["parameters"]}
        assert parsing.adds[-1].grammar
    before = len(parsing.adds)
    assert parsing.ask(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "required", "n": 3})[0] == 200
    assert [bool(add.grammar) for add in parsing.adds[before:]] == [True, False, False], "once for all choices"
    other = {"type": "function", "function": {"name": "other"}}
    for asked in (
        {"tools": TOOLS, "tool_choice": other},
        {"tools": TOOLS, "tool_choice": "always"},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
    ):
        status, answer, _ = parsing.ask(CHAT, {"messages": HI} | asked)
        assert (status, answer["error"]["param"]) == (400, "tool_choice"), answer
    for field in ({"tools": [{"type": "function", "function": {}}]}, {"chat_template_kwargs": {"tools": 5}}):
        status, answer, _ = parsing.ask(CHAT, {"messages": HI, "tool_choice": "required"} | field)
        assert (status, answer["error"]["param"]) == (400, "tools"), answer


@pytest.mark.parametrize(
    "field",
    [
        {"open_pattern": "<(?P<name>\\w+)>", "transform": {"function": {"name": "{name}", "arguments": "{content}"}}},
        {"open": "<call>", "content": "kv-lines", "transform": {"function": "{content}"}},
        {"open": "<call>", "transform": {"function": {"name": "fixed", "arguments": "{content.a}"}}},
    ],
)
def test_calls_that_are_not_json_between_two_texts_cannot_be_forced(field: dict[str, Any]) -> None:
    spec = {"start_anchor": "x", "fields": {"tool_calls": {"content": "json", "close": "</call>"} | field}}
    with pytest.raises(ValueError, match="^tool_choice is not supported here"):
        forced_call(load_response_template(spec), "x", TOOLS, ["add"])


def test_tools_without_a_template_for_answers_are_refused(model: Path) -> None:
    with serving(model) as world:
        status, answer, _ = world.ask(CHAT, {"messages": HI, "tools": TOOLS})
        assert (status, answer["error"]["param"]) == (400, "tools")
        assert world.ask(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "none"})[0] == 200
        assert world.ask(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "required"})[0] == 400


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_full_server_says_when_to_come_again(model: Path) -> None:
    with serving(model, never, max_live=2, max_live_tokens=10) as world:
        with world.connect() as client:
            client.sendall(request_of({"prompt": ["a", "b"]}))
            world.wait_for(lambda: len(world.adds) == 2)
            status, answer, headers = world.ask(COMPLETE, {"prompt": "c"})
            assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "overloaded", "1")
        world.wait_for(lambda: sorted(world.aborted) == [add.index for add in world.adds])
        with world.connect() as client:
            client.sendall(request_of({"prompt": "a prompt that is alone may have more tokens"}))
            world.wait_for(lambda: len(world.adds) == 3)
            assert world.ask(COMPLETE, {"prompt": "c"})[1]["error"]["code"] == "overloaded"
        world.wait_for(lambda: len(world.aborted) == 3)
        world._answer = at_once
        assert world.ask(COMPLETE, {"prompt": "c"})[0] == 200


def test_the_compiler_is_there_before_it_is_asked_and_its_queue_is_bounded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xgrammar")
    started = threading.Event()
    start = GrammarCompiler.start
    monkeypatch.setattr(GrammarCompiler, "start", lambda compiler: (start(compiler), started.set()))
    with serving(model, starts_compiler=True) as world:
        assert started.wait(60)
        form = {"prompt": "a", "structured_outputs": {"regex": "a+"}}
        monkeypatch.setattr(preparing, "MAX_WAITING", 0)
        status, answer, headers = world.ask(COMPLETE, form)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "overloaded", "5")
        monkeypatch.setattr(GrammarCompiler, "_start", None)  # the one that there is serves
        monkeypatch.setattr(preparing, "MAX_WAITING", 1)
        assert world.ask(COMPLETE, form)[0] == 200


def test_bodies_prompts_and_answers_have_limits(model: Path) -> None:
    with serving(model, max_body_bytes=1000, max_prompts=2, max_choices=3) as world:
        assert world.ask(COMPLETE, {"prompt": "x" * 2000})[0] == 413
        with world.connect() as client:  # no length is told
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.sendall(b"5dc\r\n" + b"x" * 1500 + b"\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")
        assert world.ask(COMPLETE, {"prompt": ["a"] * 3})[1]["error"]["param"] == "prompt"
        assert world.ask(COMPLETE, {"prompt": ["a"] * 2, "n": 2})[1]["error"]["param"] == "n"
        assert world.ask(COMPLETE, {"prompt": ["a"] * 2})[0] == 200


def test_a_template_that_runs_on_is_given_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, render = threading.Event(), PromptReader.render

    def slow(reader: PromptReader, request: Request) -> str:
        assert request.messages is not None
        if request.messages[0]["content"] == "slow":
            ends.wait(60)
        return render(reader, request)

    monkeypatch.setattr(PromptReader, "render", slow)
    with serving(model, template_timeout_s=1.0) as world:
        status, answer, _ = world.ask(CHAT, {"messages": [{"role": "user", "content": "slow"}]})
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert world.ask(CHAT, {"messages": HI})[0] == 200, "while the other still runs"
        ends.set()


# --- ends -------------------------------------------------------------------------------------------------------------


def test_draining_refuses_new_requests_and_lets_the_others_end(model: Path) -> None:
    with serving(model, never) as world, world.connect() as client:
        client.sendall(request_of({"prompt": "a"}))
        world.wait_for(lambda: len(world.adds) == 1)
        world.send(wire.Drain())
        world.wait_for(lambda: world.closes == [Close()])
        status, answer, headers = world.ask(COMPLETE, {"prompt": "b"})
        assert (status, answer["error"]["code"]) == (503, "draining") and headers["retry-after"]
        assert world.ask("/health")[0] == 503
        world.delta(world.adds[0], "late", "stop")
        read_until(client, b'"text":"late"')


def test_what_does_not_end_in_time_is_aborted_with_an_error(model: Path) -> None:
    with serving(model, never, drain_timeout_s=0.2) as world, world.connect() as client:
        client.sendall(request_of({"prompt": "a", "stream": True}))
        world.wait_for(lambda: len(world.adds) == 1)
        world.delta(world.adds[0], "begun")
        read_until(client, b"begun")
        world.send(wire.Drain())
        world.wait_for(lambda: world.closes == [Close(), Close(abort=True)])
        read_until(client, b'"code":"draining"')


def test_a_world_that_hangs_ends_its_streams_until_it_is_heard_again(model: Path) -> None:
    with serving(model, never, stall_timeout_s=2) as world, world.connect() as client:
        client.sendall(request_of({"prompt": "a", "stream": True}))
        world.wait_for(lambda: len(world.adds) == 1)
        world.delta(world.adds[0], "begun")
        assert b'"code":"stalled"' in read_until(client, b"data: [DONE]")
        for path, body in (("/health", None), (COMPLETE, {"prompt": "b"})):
            status, answer, _ = world.ask(path, body)
            assert (status, answer["error"]["code"]) == (503, "stalled")
        world.wait_for(lambda: world.aborted == [world.adds[0].index])
        world.send(wire.News())
        world.wait_for(lambda: world.ask("/health")[:2] == (200, {"status": "ok"}))


def test_a_lost_group_is_named_and_the_rest_goes_on(model: Path) -> None:
    none = wire.Histogram([], 0, 0.0)
    stats = wire.Stats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, {}, none, none, none, none, trouble="the prefill group is gone")
    with serving(model) as world:
        world.send(wire.News(stats=stats))
        degraded = {"status": "degraded", "trouble": "the prefill group is gone"}
        world.wait_for(lambda: world.ask("/health")[:2] == (200, degraded))
        assert world.ask(COMPLETE, {"prompt": "a"})[0] == 200
        world.send(wire.News(stats=msgspec.structs.replace(stats, can_run=False)))
        world.wait_for(lambda: world.ask("/health")[0] == 503)


def test_a_world_that_ends_as_it_begins_ends_the_process_without_a_fault(model: Path) -> None:
    ours, theirs = socket.socketpair()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    ours.sendall(pack(wire.encode(wire.Setup(str(model), "fake", None, "1.2", ServingConfig(), SamplingParams()))))
    ours.close()
    asyncio.run(run(theirs, listener, starts_compiler=False))


@pytest.mark.parametrize("stream", [True, False])
def test_a_lost_world_is_told_and_the_process_ends_with_its_port_free(model: Path, stream: bool) -> None:
    with serving(model, never) as world, world.connect() as client:
        client.sendall(request_of({"prompt": "a", "stream": stream}))
        world.wait_for(lambda: len(world.adds) == 1)
        if stream:
            world.delta(world.adds[0], "begun")
            read_until(client, b"begun")
        world.hang_up()
        received = read_until(client, b"world_lost")
        assert stream or received.startswith(b"HTTP/1.1 503 ")
    # ``serving`` has waited for the end
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", world.port))
