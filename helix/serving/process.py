"""The HTTP process: it lives as long as rank 0 does, and ends within seconds when that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Iterator
from functools import partial

import uvicorn

from ..models.tokenizer import load_tokenizer
from .app import make_app
from .link import Link
from .protocol import DeadlineProtocol, Sockets
from .service import Service

END_S = 4.0
"""How long responses may take to leave once the world has ended, in seconds."""
_SPARE_FILES = 64  # of the process's own: logs, the tokenizer's files, the socket pair
_ACCEPTED_AT_ONCE, _QUEUE = 8, 1024  # more at once would take descriptors before any connection is counted
_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's, which leaves signals alone: rank 0 says when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def run(link_socket: socket.socket, listener: socket.socket, *, starts_compiler: bool = True) -> None:
    """Serve until rank 0 hangs up.

    Args:
        link_socket: one end of a socket pair; rank 0 has the other.
        listener: a bound socket.
        starts_compiler: start what compiles grammars at once, and not when the first one comes.
    """
    link = Link(*await asyncio.open_connection(sock=link_socket))
    hearing = asyncio.create_task(link.run())
    await link.set_up.wait()
    if link.setup is None:
        return
    service = Service(link, link.setup)
    sockets = Sockets(_max_connections(link.setup.serving.max_connections), link.setup.serving.receive_timeout_s)
    config = uvicorn.Config(
        make_app(service),
        http=partial(DeadlineProtocol, sockets),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(END_S) - 1,
        backlog=_ACCEPTED_AT_ONCE,
    )
    server = Server(config)
    serving = asyncio.create_task(_serve(server, listener))
    opening = asyncio.create_task(_open(service, starts_compiler))
    await asyncio.wait((hearing, serving, opening), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await asyncio.wait((serving,), timeout=END_S)
    for task in (hearing, serving, opening):
        if task.done():
            task.result()  # what it raised


async def _serve(server: Server, listener: socket.socket) -> None:
    """Serve, with a long queue of connections that are not accepted yet, of which few are accepted at once."""
    starting = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or starting.done()):
        await asyncio.sleep(0.01)
    if server.started and not server.should_exit:  # which closes the listener
        listener.listen(_QUEUE)
    await starting


async def _open(service: Service, starts_compiler: bool) -> None:
    """Load the tokenizer while rank 0 loads the model, and open when both are there; run until the world has ended."""
    tokenizer = await asyncio.to_thread(load_tokenizer, service.setup.model_path)
    await service.link.until_ready()
    if service.link.ready is not None:
        settler = service.open(tokenizer)
        _log.info("serving %s", service.setup.served_name)
        try:
            if starts_compiler:
                await settler.start_compiler()
            await service.link.until_gone()
        finally:
            settler.close()


def _max_connections(asked: int | None) -> int:
    """Return how many sockets may be open: as asked, or as many as the process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    room = max(soft - _SPARE_FILES, 1)
    return room if asked is None else min(asked, room)
