"""Clients that ask, leave, read slowly and send nonsense, at random; each answer that came whole is kept."""

import json
import socket
import threading
import time
from dataclasses import dataclass, field
from random import Random
from typing import Any


@dataclass
class Walk:
    """What some clients did.

    Attributes:
        head: makes the head of a request to a body.
        port: where they connect.
        answers: what was asked for, and the text that came.
        wrong: what should not have come.
    """

    head: Any
    port: int
    answers: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def run(self, num_operations: int, num_clients: int, seed: int) -> None:
        """Do so many things, by several clients at once."""
        threads = [
            threading.Thread(target=self._client, args=(Random(seed * 1000 + number), num_operations // num_clients))
            for number in range(num_clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, random: Random, num_operations: int) -> None:
        for _ in range(num_operations):
            operation = random.choice([self._ask, self._ask, self._stream, self._stream, self._leave, self._nonsense])
            try:
                operation(random)
            except Exception as error:
                self.wrong.append(f"{operation.__name__}: {error!r}")

    def _asked(self, random: Random, stream: bool) -> dict[str, Any]:
        document = "the same document for all of them, " * random.choice([0, 0, 3])
        prompt = document + "".join(random.choice("abc ") for _ in range(random.randint(1, 40)))
        asked = {"prompt": prompt, "max_tokens": random.randint(1, 12), "stream": stream}
        return asked | ({"temperature": 0.9, "seed": random.randint(0, 99)} if random.random() < 0.5 else {})

    def _ask(self, random: Random) -> None:
        asked = self._asked(random, False)
        with self._send(asked) as client:
            head, _, body = _all(client).partition(b"\r\n\r\n")
        assert b" 200 " in head, head
        self.answers.append((asked, json.loads(body)["choices"][0]["text"]))

    def _stream(self, random: Random) -> None:
        asked = self._asked(random, True)
        with self._send(asked) as client:
            received = b""
            while piece := client.recv(random.choice([64, 4096])):
                received += piece
                if random.random() < 0.1:
                    time.sleep(0.05)
        lines = _joined(received.partition(b"\r\n\r\n")[2]).splitlines()
        events = [line[6:] for line in lines if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]", received
        self.answers.append((asked, "".join(json.loads(each)["choices"][0]["text"] for each in events[:-1])))

    def _leave(self, random: Random) -> None:
        asked = self._asked(random, random.random() < 0.5) | {"max_tokens": 400, "ignore_eos": True}
        with self._send(asked) as client:
            if asked["stream"] and random.random() < 0.5:
                client.recv(512)
            time.sleep(random.random() * 0.2)

    def _nonsense(self, random: Random) -> None:
        bad = random.choice([b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "a", "n": 0}', b'{"prompt": "\\ud800"}'])
        with self._send(bad) as client:
            assert b" 400 " in _all(client).partition(b"\r\n")[0]

    def _send(self, body: dict[str, Any] | bytes) -> socket.socket:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        client.sendall(self.head(data, close=True) + data)
        return client


def _all(client: socket.socket) -> bytes:
    received = b""
    while piece := client.recv(1 << 16):
        received += piece
    return received


def _joined(chunked: bytes) -> bytes:
    """Return a body that was sent in chunks."""
    body, rest = b"", chunked
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body
