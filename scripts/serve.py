"""Serve a checkpoint over HTTP, with OpenAI's API, on the world's ranks.

    torchrun --standalone --nproc-per-node 4 -m scripts.serve model.path=DIR parallel.kvp=2 parallel.tpa=2 port=8000

docs/serving.md has the paths, the fields of a request, and what SIGTERM does. A key that clients must send is read from
HELIX_API_KEY or the file serve.api_key_file, never from the command line; without one only this machine is served.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from helix.config import HelixConfig
from helix.inbox import Inbox
from helix.llm import LLM, enter
from helix.models.generation_config import with_models_sampling
from helix.serving import wire
from helix.serving.clients import Clients
from helix.serving.config import KEY_VARIABLE, ServingConfig
from helix.serving.kv_events import Publisher
from helix.serving.parsing import response_template
from parallel.launch import from_rank0, set_up_logging
from scripts import cli, ending
from scripts.generate import cache_events
from scripts.outputs import check_writable

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN_WAIT_S = 30.0  # torchrun kills what lives so long after a signal, unless it is told otherwise
END_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class ServeConfig(HelixConfig):
    """The settings of the command.

    Attributes:
        port: where clients connect; 0 takes a free one, which is logged.
        host: the address to listen on.
        serve: what the server allows.
    """

    port: int = 8000
    host: str = "127.0.0.1"
    serve: ServingConfig = field(default_factory=ServingConfig)

    def __post_init__(self) -> None:
        self.speculative.check_used()
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port = {self.port} must lie in [0, 65535]")


def run(config: ServeConfig) -> None:
    """Serve on this rank until a signal ends it; a prefill group serves the other group alone."""
    launch = enter(config)
    ending.enter_part(launch)
    prefills = config.transfer.prefills(launch.part)
    set_up_logging(launch.rank, "prefill rank" if prefills else "rank")
    if prefills:
        llm = LLM(config)
        with ending.taking_signals(lambda _: True):
            try:
                llm.serve()
            except OSError as error:
                raise ending.RunFailed(str(error)) from error
            llm.close()
    elif launch.speaks:
        lead(with_models_sampling(config))
    else:
        follow(with_models_sampling(config))


def lead(config: ServeConfig) -> None:
    """Serve on rank 0, with the HTTP process beside it."""
    listener, key, publisher = prepared(config)
    assert listener is not None
    warn_of_torchrun(config.serve.drain_timeout_s)
    with http_process(listener) as (process, clients):
        clients.tell(setup_of(config, key))
        llm = LLM(config)
        with ending.taking_signals(SignalTaker(clients).take):
            llm.vocabulary.prepare()
            limits, turn_ends = llm.preparer.limits, llm.preparer.end_of_turn_ids
            clients.open(llm, wire.Ready(llm.spec.vocab_size, limits, list(turn_ends), llm.vocabulary.end_ids))
            with cache_events(llm, config.cache.events), kv_events(llm, publisher):
                for events in llm.turns(clients.inbox):
                    clients.publish(llm, events)
            lost = from_rank0(lambda: clients.has_gone)
        llm.close()
        clients.close(END_S)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
    finish(lost)


def follow(config: ServeConfig) -> None:
    """Serve on another rank: signals are rank 0's to act on."""
    prepared(config)
    llm = LLM(config)
    with ending.taking_signals(lambda _: True):
        for _ in llm.turns(Inbox()):
            pass
        lost = from_rank0(lambda: False)
    llm.close()
    finish(lost)


def finish(lost: bool) -> None:
    """Raise RunFailed where the HTTP process has ended on its own."""
    if lost:
        raise ending.RunFailed("the HTTP process has ended; what it said is above")


@contextmanager
def kv_events(llm: LLM, publisher: Publisher | None) -> Iterator[None]:
    """Publish what is cached as it changes, where that is asked for."""
    if publisher is None:
        yield
        return
    llm.listen(publisher.note)
    try:
        yield
    finally:
        llm.unlisten(publisher.note)
        publisher.close()


def prepared(config: ServeConfig) -> tuple[socket.socket | None, str | None, Publisher | None]:
    """Return rank 0's bound socket, the key that clients must send, and who publishes what is cached; None elsewhere.

    Collective over the world.

    Raises:
        ValueError: where the server cannot be as it is asked for: before anything is loaded.
    """
    found: list[tuple[socket.socket, str | None, Publisher | None]] = []
    serving = config.serve

    def find() -> None:
        for name in ("starlette", "uvicorn", "prometheus_client", *(["zmq"] if serving.kv_events is not None else [])):
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"scripts.serve needs {name}: pip install -c constraints.txt -e '.[serve]'")
        key = serving.key(os.environ.get(KEY_VARIABLE))
        serving.require_key(config.host, key)
        check_writable(config.cache.events)
        if serving.response_template is not None:
            response_template(serving.response_template)
        publisher = None
        if serving.kv_events is not None:
            names = serving.kv_events, serving.kv_events_replay, serving.kv_events_topic
            publisher = Publisher(*names, block_size=config.cache.block_size)
        found.append((bound(config.host, config.port), key, publisher))

    from_rank0(find)
    return found[0] if found else (None, None, None)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; ValueError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as cleaning:
            sock = cleaning.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            cleaning.pop_all()
    except OSError as error:
        raise ValueError(f"host = {host}, port = {port} cannot be listened on: {error.strerror or error}") from error
    return sock


def setup_of(config: ServeConfig, key: str | None) -> wire.Setup:
    """Return what the HTTP process needs to begin."""
    path = Path(config.model.path).expanduser().resolve()
    folder = path if path.is_dir() else path.parent
    try:
        version = importlib.metadata.version("helix-runtime")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    name = config.serve.model_name or folder.name
    serving = config.serve
    if serving.response_template is not None:
        serving = replace(serving, response_template=str(Path(serving.response_template).expanduser().resolve()))
    return wire.Setup(str(path), name, key, version, serving, config.sampling)


def warn_of_torchrun(drain_timeout_s: float) -> None:
    """Say that torchrun would end the server before its answers have had their time, where it would."""
    wait_s = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_WAIT_S))
    if drain_timeout_s + END_S > wait_s:
        _log.warning(
            "serve.drain_timeout_s = %g: torchrun ends all ranks %g s after a signal unless its --shutdown-timeout "
            "says more: give it %g",
            drain_timeout_s, wait_s, drain_timeout_s + END_S,
        )  # fmt: skip


@contextmanager
def http_process(listener: socket.socket) -> Iterator[tuple[subprocess.Popen[bytes], Clients]]:
    """Run the HTTP process beside this one, in a session of its own, where no signal of this one's reaches it.

    It ends by itself where this process does, however that ends.
    """
    ours, theirs = socket.socketpair()
    _log.info("listening on %s port %d", *listener.getsockname()[:2])
    command = [sys.executable, "-m", "scripts.http_process", str(theirs.fileno()), str(listener.fileno())]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        pass_fds=(theirs.fileno(), listener.fileno()),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )
    theirs.close()
    listener.close()
    yield process, Clients(ours)


class SignalTaker:
    """Lets the first signal drain the server, and leaves the second to end it.

    Args:
        clients: who are told.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._is_draining = False

    def take(self, number: int) -> bool:
        """Take a signal; False where it is to end this rank."""
        if self._is_draining:
            return False
        self._is_draining = True
        _log.info("%s: taking no more requests; a second signal ends the server at once", signal.Signals(number).name)
        self._clients.tell(wire.Drain())
        return True


if __name__ == "__main__":
    cli.main("serve", ServeConfig, run)
