"""Clients that send slowly, read nothing, send what is no request, or leave: before a scripted world."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helix.commands import Add
from helix.serving import wire
from helix.serving.link import Call, Link
from helix.serving.sending import ClientGone, while_connected
from scripts.make_checkpoint import make_checkpoint
from tests.helix.serving.fake_world import FakeWorld, never, read_until, request_of, serving

COMPLETE = "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("http") / "model", layers=1)


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
