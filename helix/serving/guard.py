"""What stands before every path, as plain ASGI: the key, and a name for each request."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from .errors import ApiError
from .sending import Receive, Scope, Send, send_error

App = Callable[[Scope, Receive, Send], Awaitable[None]]
REQUEST_ID = "helix.request_id"
_NAME = re.compile(rb"[!-~]{1,200}")


class Guard:
    """Lets nobody in without the key, and sends each response with its X-Request-Id.

    Args:
        app: what it guards.
        key: what ``Authorization: Bearer`` must hold; None asks for none.
        open_paths: paths that ask for none.
    """

    def __init__(self, app: App, key: str | None, open_paths: Iterable[str]) -> None:
        self._app, self._open = app, frozenset(open_paths)
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if _NAME.fullmatch(given) else secrets.token_hex(12).encode()
        scope[REQUEST_ID] = name.decode()

        async def named(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        if scope["path"] not in self._open and not self._has_key(headers.get(b"authorization", b"")):
            await send_error(
                named, ApiError(401, "this needs a valid key: Authorization: Bearer KEY", code="invalid_api_key")
            )
            return
        await self._app(scope, receive, named)

    def _has_key(self, given: bytes) -> bool:
        if self._key is None:
            return True
        kind, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and kind.lower() == b"bearer"
