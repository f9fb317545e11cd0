"""The paths of the server, on Starlette. Middleware is plain ASGI: anything else would hide that a client has left."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..fields import CHAT, COMPLETIONS, is_ids
from ..request import Request
from .asking import asked_of, read_json, require_model
from .errors import ApiError
from .exposition import CONTENT_TYPE, Exposition
from .guard import REQUEST_ID, App, Guard
from .protocol import ABORT_EXTENSION
from .sending import ClientGone, Receive, Scope, Send, read_body, send_bytes, send_error, send_json
from .service import Service

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class Endpoint:
    """A path's handler as an ASGI application: what it raises becomes a response, a client that left none."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            await self._handler(scope, receive, send)
        except ApiError as error:
            await send_error(send, error)
        except ClientGone:
            scope.get("extensions", {}).get(ABORT_EXTENSION, _nothing)()


def make_app(service: Service) -> App:
    """Return the whole application."""
    paths = Paths(service)
    routes = [
        Route("/v1/completions", Endpoint(paths.completions), methods=["POST"]),
        Route("/v1/chat/completions", Endpoint(paths.chat), methods=["POST"]),
        Route("/v1/models", Endpoint(paths.models), methods=["GET"]),
        Route("/v1/models/", Endpoint(paths.models), methods=["GET"]),
        Route("/v1/models/{name:path}", Endpoint(paths.model), methods=["GET"]),
        Route("/tokenize", Endpoint(paths.tokenize), methods=["POST"]),
        Route("/detokenize", Endpoint(paths.detokenize), methods=["POST"]),
        Route("/health", Endpoint(paths.health), methods=["GET"]),
        Route("/metrics", Endpoint(paths.metrics), methods=["GET"]),
        Route("/version", Endpoint(paths.version), methods=["GET"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refuse, Exception: _fail})
    return Guard(app, service.setup.key, ["/health", *service.setup.serving.open_paths])


class Paths:
    """What each path does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._exposition = Exposition(service.link, service.setup)
        self._began = int(time.time())

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Complete prompts."""
        await self._service.answer(COMPLETIONS, scope, receive, send, scope[REQUEST_ID])

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer messages."""
        await self._service.answer(CHAT, scope, receive, send, scope[REQUEST_ID])

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """List the model that is served."""
        await send_json(send, {"object": "list", "data": [self._model()]})

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell of one model."""
        require_model(scope["path_params"]["name"], self._service.setup.served_name)
        await send_json(send, self._model())

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Turn a prompt, or messages, into token ids."""
        service, settler = self._service, self._service.ready(0)
        setup, ready = service.setup, service.link.ready
        assert ready is not None
        given = read_json(await read_body(scope, receive, setup.serving.max_body_bytes))
        with_names = given.pop("return_token_strs", False)
        adds_special = given.pop("add_special_tokens", True)
        endpoint = CHAT if "messages" in given else COMPLETIONS
        asked = await settler.beside(
            lambda: asked_of(given, endpoint, setup.served_name, setup.sampling, setup.serving)
        )
        [request, *others] = asked.requests
        if others:
            raise ApiError(400, "prompt holds several prompts; tokenize one at a time", param="prompt")
        request = await settler.rendered(request)
        if not adds_special:
            request = replace(request, is_rendered=True)
        ids = await settler.beside(lambda: settler.token_ids(request))
        content: dict[str, Any] = {"count": len(ids), "max_model_len": ready.max_position, "tokens": ids}
        if with_names:
            content["token_strs"] = [service.texts.spelled(each)[0] for each in ids]
        await send_json(send, content)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Turn token ids into text."""
        service, settler = self._service, self._service.ready(0)
        given = read_json(await read_body(scope, receive, service.setup.serving.max_body_bytes))
        require_model(given.pop("model", None), service.setup.served_name)
        ids = given.get("tokens")
        if not is_ids(ids):
            raise ApiError(400, "tokens must be a list of token ids", param="tokens")
        if service.tokenizer is None:
            raise ApiError(400, "the model folder has no tokenizer")
        if ids:
            await settler.beside(lambda: settler.token_ids(Request(prompt_token_ids=ids)))
        await send_json(send, {"prompt": await settler.beside(lambda: service.tokenizer.decode(ids))})

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 200 only when a step can run, and name what is wrong all the same."""
        self._service.ready(0)
        stats = self._service.link.stats
        if stats is None or not stats.trouble:
            await send_json(send, {"status": "ok"})
        elif stats.can_run:
            await send_json(send, {"status": "degraded", "trouble": stats.trouble})
        else:
            raise ApiError(503, stats.trouble, code="group_lost")

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the counters."""
        await send_bytes(send, self._exposition.text(), CONTENT_TYPE)

    async def version(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell the version."""
        await send_json(send, {"version": self._service.setup.version})

    def _model(self) -> dict[str, Any]:
        ready = self._service.link.ready
        return {
            "id": self._service.setup.served_name,
            "object": "model",
            "created": self._began,
            "owned_by": "helix",
            "root": self._service.setup.model_path,
            "max_model_len": None if ready is None else ready.max_position,
        }


async def _refuse(request: HttpRequest, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = getattr(error, "headers", None)
    what = f"{request.method} {request.url.path} is not answered here"
    return JSONResponse(ApiError(status, what).body(), status, headers)


async def _fail(request: HttpRequest, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed at this request; its log says why").body(), 500)


def _nothing() -> None:
    pass
