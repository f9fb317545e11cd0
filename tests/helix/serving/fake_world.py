"""The HTTP side as it is, in a thread, before a rank 0 that a test writes: no model, no ranks."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helix.commands import Abort, Add, Close, decode
from helix.prompts import Limits
from helix.sampling import SamplingParams
from helix.serving import wire
from helix.serving.config import ServingConfig
from helix.serving.framing import pack, read_frame
from helix.serving.process import run
from parallel.placement import BlockCyclic

Answer = Callable[["FakeWorld", Add], None]
MAX_POSITION = 1000


class FakeWorld:
    """Rank 0 without a world.

    Attributes:
        adds, aborted: what has come.
        is_closed: a ``Close`` has come.
    """

    def __init__(self, sock: socket.socket, port: int, answer: Answer) -> None:
        self.port = port
        self.adds: list[Add] = []
        self.aborted: list[int] = []
        self.closes: list[Close] = []
        self._sock, self._answer = sock, answer
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, message: wire.Down) -> None:
        self._sock.sendall(pack(wire.encode(message)))

    def delta(self, add: Add, text: str, reason: str | None = None, *, ids: tuple[int, ...] = (1,)) -> None:
        end = None if reason is None else wire.End(reason, add.prompt_len, 0, None)
        self.send(wire.News([wire.Delta(add.index, list(ids), text, [], end)]))

    def hang_up(self) -> None:
        if self._sock.fileno() >= 0:
            self._sock.shutdown(socket.SHUT_RDWR)
            self._thread.join(5)
            self._sock.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def ask(self, path: str, body: Any = None) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text.decode(), response.headers

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Return the events of a stream, the last of which must be [DONE]."""
        status, text, _ = self.ask(path, body | {"stream": True})
        assert status == 200, text
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    def wait_for(self, holds: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(0.01)

    def _read(self) -> None:
        while (frame := read_frame(self._sock)) is not None:
            command = decode(frame)
            if isinstance(command, Add):
                self.adds.append(command)
                self._answer(self, command)
            elif isinstance(command, Abort):
                self.aborted.append(command.index)
            elif isinstance(command, Close):
                self.closes.append(command)


def at_once(world: FakeWorld, add: Add) -> None:
    """Answer every request with one text."""
    world.delta(add, "an answer", "stop")


def never(world: FakeWorld, add: Add) -> None:
    """Answer nothing."""


@contextmanager
def serving(
    model: Path, answer: Answer = at_once, *, key: str | None = None, starts_compiler: bool = False, **settings: Any
) -> Iterator[FakeWorld]:
    """Run the HTTP side; it has ended, within its time, when this has."""
    ours, theirs = socket.socketpair()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    world = FakeWorld(ours, listener.getsockname()[1], answer)
    thread = threading.Thread(target=lambda: asyncio.run(run(theirs, listener, starts_compiler=starts_compiler)))
    thread.start()
    config = ServingConfig(**settings)
    world.send(wire.Setup(str(model), "fake", key, "1.2", config, SamplingParams()))
    world.send(wire.Ready(320, Limits(MAX_POSITION, BlockCyclic(16, 2), 64, 20), [257], [257]))
    try:
        world.wait_for(lambda: _is_healthy(world), 30)
        yield world
    finally:
        world.hang_up()
        thread.join(10)
        assert not thread.is_alive()


def _is_healthy(world: FakeWorld) -> bool:
    try:
        return world.ask("/health")[0] == 200
    except OSError:
        return False


def request_of(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def read_until(client: socket.socket, text: bytes) -> bytes:
    received = b""
    while text not in received:
        received += (piece := client.recv(4096))
        assert piece, received
    return received
