"""uvicorn's HTTP/1.1 protocol with what it lacks: a deadline for sending a request, and a limit of open sockets.

Without the first, clients that send a byte now and then hold sockets for ever; without the second, the process runs out
of descriptors and takes no connection at all. Where the limit is reached the connection that has been sending its
request the longest makes room, and a new one is closed only where all are being answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .sending import Receive, Scope, Send

ABORT_EXTENSION = "helix.abort"


@dataclass(slots=True)
class Sockets:
    """The connections of one server.

    Attributes:
        most: that may be open at once.
        receive_timeout_s: how long a client may take to send a request, in seconds.
        receiving: those whose request has not come whole, the one that waits longest first.
        num_open: all of them.
    """

    most: int
    receive_timeout_s: float
    receiving: dict[DeadlineProtocol, None] = field(default_factory=dict)
    num_open: int = 0


class DeadlineProtocol(H11Protocol):
    """One connection.

    Args:
        sockets: all of them.
        arguments: uvicorn's own.
    """

    def __init__(self, sockets: Sockets, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._sockets = sockets
        self._deadline: asyncio.TimerHandle | None = None
        self._counts = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.app = partial(_with_abort, self.app, transport.abort)
        self._sockets.num_open += 1
        self._counts = True
        self._begin_to_wait()
        if self._sockets.num_open > self._sockets.most:
            next(iter(self._sockets.receiving)).give_way()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._forget()
        super().connection_lost(exc)

    def give_way(self) -> None:
        """Hang up, and count no more."""
        self._forget()
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the deadline stays where it is until the request is whole."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.more_body:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle.response_complete or self.cycle.more_body):
            self._stop_waiting()
            self._begin_to_wait()

    def _forget(self) -> None:
        self._sockets.num_open -= self._counts
        self._counts = False
        self._stop_waiting()

    def _begin_to_wait(self) -> None:
        self._sockets.receiving[self] = None
        self._deadline = self.loop.call_later(self._sockets.receive_timeout_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        self._sockets.receiving.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


async def _with_abort(app: Any, abort: Any, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
    scope["extensions"] = {**scope.get("extensions", {}), ABORT_EXTENSION: abort}
    return await app(scope, receive, send)
