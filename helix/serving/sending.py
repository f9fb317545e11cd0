"""Responses on plain ASGI: JSON, server-sent events, and an end where the client has left or reads no more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from .errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has closed its connection, or reads no more."""


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: 413 where it is longer than ``most`` bytes, 415 where it is compressed.
        ClientGone: where the client left before its end.
    """
    too_long = ApiError(413, f"the body exceeds serve.max_body_bytes = {most}", code="body_too_large")
    headers = dict(scope["headers"])
    if (coding := headers.get(b"content-encoding", b"identity")) != b"identity":
        raise ApiError(415, f"a body of content-encoding {coding.decode('latin-1')} is not read; send it as it is")
    said = headers.get(b"content-length", b"0")
    if said.isdigit() and int(said) > most:
        raise too_long
    parts, total = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        total += len(parts[-1])
        if total > most:
            raise too_long
        if not message.get("more_body", False):
            return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns; where the client leaves before, it is cancelled. The body must have been read.

    Raises:
        ClientGone: where the client has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def send_json(send: Send, content: Any, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Send a response of JSON."""
    body = msgspec.json.encode(content)
    await send_bytes(send, body, b"application/json", status, headers)


async def send_bytes(
    send: Send, body: bytes, kind: bytes, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """Send a whole response."""
    lines = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(send: Send, error: ApiError) -> None:
    """Send an error. One that left a body unread closes the connection: the rest of it is no request."""
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status in (401, 413, 415):
        headers.append((b"connection", b"close"))
    await send_json(send, error.body(), error.status, tuple(headers))


class EventStream:
    """Server-sent events of one response, which begins with the first of them.

    Args:
        send: the response's.
        timeout_s: how long the client may leave what was sent unread, in seconds.
    """

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send, self._timeout_s = send, timeout_s
        self.has_begun = False

    async def events(self, contents: list[dict[str, Any]]) -> None:
        """Send events, each a JSON object."""
        if contents:
            await self.write(b"".join(b"data: " + msgspec.json.encode(each) + b"\n\n" for each in contents))

    async def comment(self, text: str) -> None:
        """Send a line that clients pass over, so that nobody between takes the connection for dead."""
        await self.write(f": {text}\n\n".encode())

    async def end(self) -> None:
        """Send what OpenAI's streams end with."""
        await self.write(DONE)
        await self._within({"type": "http.response.body", "body": b"", "more_body": False})

    async def write(self, data: bytes) -> None:
        """Send bytes; ClientGone where the client does not read them in time."""
        if not self.has_begun:
            self.has_begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            await self._within({"type": "http.response.start", "status": 200, "headers": headers})
        await self._within({"type": "http.response.body", "body": data, "more_body": True})

    async def _within(self, message: MutableMapping[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):  # Python 3.11's wait_for may lose that it was cancelled
                await self._send(message)
        except TimeoutError as error:
            raise ClientGone from error


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
