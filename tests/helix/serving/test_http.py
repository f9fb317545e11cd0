"""The HTTP side before a scripted world: parts of answers, limits, clients that misbehave, and how it ends."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers.utils.chat_parsing.response_templates import load_response_template

from helix.commands import Add, Close
from helix.grammar.compiling import GrammarCompiler
from helix.prompts import PromptReader
from helix.request import Request
from helix.serving import preparing, wire
from helix.serving.forced_calls import forced_call
from helix.serving.link import Call, Link
from helix.serving.sending import ClientGone, while_connected
from scripts.make_checkpoint import make_checkpoint
from tests.helix.serving.fake_world import FakeWorld, at_once, never, serving

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


# --- clients that misbehave -------------------------------------------------------------------------------------------


def request_of(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def read_until(client: socket.socket, text: bytes) -> bytes:
    received = b""
    while text not in received:
        received += (piece := client.recv(4096))
        assert piece, received
    return received


def is_closed(client: socket.socket) -> bool:
    """Wait for the other end to hang up."""
    client.settimeout(10)
    try:
        while client.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def test_slow_senders_have_a_deadline_and_hold_nobody_up(model: Path) -> None:
    begun = [b"", b"POST /v1/compl", request_of({"prompt": "a"})[:-2]]
    for timeout_s in (60.0, 0.2):
        with serving(model, receive_timeout_s=timeout_s) as world:
            slow = [world.connect() for _ in range(48)]
            for number, client in enumerate(slow):
                client.sendall(begun[number % 3])
            if timeout_s > 1:
                assert world.ask(COMPLETE, {"prompt": "a"})[0] == 200 and len(world.adds) == 1
            else:
                assert all(is_closed(client) for client in slow) and world.adds == []
            for client in slow:
                client.close()


def test_a_new_connection_takes_the_place_of_one_that_has_not_asked(model: Path) -> None:
    with serving(model, max_connections=20) as world:
        idle = [world.connect() for _ in range(60)]
        assert world.ask(COMPLETE, {"prompt": "a"})[0] == 200
        assert all(is_closed(client) for client in idle[:40])
        for client in idle:
            client.close()


def test_a_client_that_reads_nothing_is_cut_off_and_what_waits_for_it_is_bounded(model: Path) -> None:
    stop = threading.Event()

    def pour(world: FakeWorld, add: Add) -> None:
        def run() -> None:
            while not stop.is_set() and add.index not in world.aborted:
                world.delta(add, "x" * 20_000)
                time.sleep(0.001)

        threading.Thread(target=run, daemon=True).start()

    with serving(model, pour, send_timeout_s=0.5) as world, world.connect() as client:
        client.sendall(request_of({"prompt": "a", "stream": True}))
        world.wait_for(lambda: [add.index for add in world.adds] == world.aborted != [])
        stop.set()
        assert is_closed(client)


def test_what_comes_while_a_client_reads_slowly_is_merged(model: Path) -> None:
    with serving(model, never) as world, world.connect() as client:
        client.sendall(request_of({"prompt": "a", "stream": True}))
        world.wait_for(lambda: len(world.adds) == 1)
        for number in range(1500):
            world.delta(world.adds[0], f"{number:4} " * 1000)
        world.delta(world.adds[0], "", "stop")
        time.sleep(0.5)
        received = bytearray()
        while b"[DONE]" not in received[-100:]:
            received += client.recv(1 << 16)
        events = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
        assert text == "".join(f"{number:4} " * 1000 for number in range(1500))
        assert len(events) < 1200


def test_what_is_no_request_gets_400_and_does_no_harm(model: Path) -> None:
    with serving(model) as world:
        for nonsense in (
            b"GET / HTTP/9\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Long: " + b"y" * 2_000_000,
        ):
            with world.connect() as client:
                try:
                    client.sendall(nonsense)
                    assert client.recv(100).startswith(b"HTTP/1.1 400 ")
                except ConnectionError:
                    pass  # it hung up on what was still being sent
                assert is_closed(client)
        assert world.ask(COMPLETE, {"prompt": "a"})[0] == 200


def test_what_people_send_is_read_or_its_fault_is_named(model: Path) -> None:
    with serving(model) as world:
        assert world.ask(COMPLETE, b"\xef\xbb\xbf" + b'{"prompt": "a", "n": 2.0}')[0] == 200
        assert [each.prompt_len for each in world.adds] == [1, 1]
        assert world.ask("/v1/models/")[1]["object"] == "list"
        assert world.ask("/detokenize", {"tokens": []})[1] == {"prompt": ""}
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"messages": "hi"}, "messages"),
            ("/detokenize", {"tokens": ["1"]}, "tokens"),
            (COMPLETE, {"prompt": ""}, "prompt"),
            (COMPLETE, {"prompt": "a", "n": 1.5}, "n"),
            ("/v1/chat/completions", {"messages": []}, "messages"),
        ):
            status, answer, _ = world.ask(path, body)
            assert (status, answer["error"]["param"]) == (400, param), answer
        with world.connect() as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\n"
            )
            assert b"content-encoding gzip" in read_until(client, b"}}")


def test_a_client_that_leaves_as_a_token_comes_is_seen() -> None:
    dropped: list[int] = []

    class Nobody(Link):
        def __init__(self) -> None:
            pass

        def drop(self, indices: Sequence[int], running: set[int]) -> None:
            dropped.extend(running)

    async def leave() -> None:
        call, gone = Call(Nobody(), [7]), asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                while True:
                    await call.take(60)
            finally:
                call.close()

        async def at_once() -> None:
            await asyncio.sleep(0.05)
            gone.set()
            call.push(wire.Delta(7, [1], "a"))

        serving = asyncio.create_task(while_connected(receive, work()))
        await at_once()
        done, _ = await asyncio.wait((serving,), timeout=3)
        assert dropped == [7] and done == {serving}
        with pytest.raises(ClientGone):
            serving.result()

    asyncio.run(leave())


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
