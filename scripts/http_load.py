"""The client of scripts.bench_serve: streams of one server, as many at once as a batch; python -m scripts.http_load.

It reads {"port": ..., "batch": ..., "bodies": [...]} from stdin and writes figures to stdout, both JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress
from typing import Any

import msgspec

from scripts.token_times import figures_of

READY_S = 60.0


async def _connect(port: int, head: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    writer.write(f"{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{length}\r\n".encode() + body)
    return reader, writer


async def until_ready(port: int) -> None:
    """Wait until the server can answer; TimeoutError where it does not."""
    async with asyncio.timeout(READY_S):
        while True:
            with suppress(ConnectionRefusedError):  # it does not listen yet
                reader, writer = await _connect(port, "GET /health", b"")
                status = (await reader.readline()).split()[1]
                writer.close()
                if status == b"200":
                    return
            await asyncio.sleep(0.1)


async def stream(port: int, body: bytes) -> list[float]:
    """Return when each token of a completion came; RuntimeError where it is not answered."""
    reader, writer = await _connect(port, "POST /v1/completions", body)
    times: list[float] = []
    status = (await reader.readline()).split()[1]
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            chunk = msgspec.json.decode(line[6:])
            if "choices" not in chunk:
                raise RuntimeError(f"the server said {line.decode()}")
            times += [time.perf_counter()] * sum(len(choice["token_ids"]) for choice in chunk["choices"])
    writer.close()
    if status != b"200" or not times:
        raise RuntimeError(f"the server answered with status {status.decode()} and {len(times)} tokens")
    return times


async def load(port: int, batch: int, bodies: list[dict[str, Any]]) -> dict[str, float]:
    """Send all bodies and return the figures."""
    await until_ready(port)
    waiting = [json.dumps(body).encode() for body in reversed(bodies)]
    began = time.perf_counter()
    arrived: list[float] = []
    tokens: list[list[float]] = []

    async def work() -> None:
        while waiting:
            arrival = time.perf_counter()
            times = await stream(port, waiting.pop())
            arrived.append(arrival)
            tokens.append(times)

    await asyncio.gather(*(work() for _ in range(batch)))
    return figures_of(tokens, arrived, began)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(**json.load(sys.stdin)))))
