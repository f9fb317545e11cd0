"""A set of rank processes that lives as long as the pytest session and runs the bodies of tests.

Why: starting 8 ranks for every test costs seconds, and a plain launcher leaves the suite green, or hanging, when a
child crashes. Here every rank reports on every body, and whatever else it does (raise, die, hang) fails the test.

 1. The first run starts the ranks from a fork server that has torch loaded; they meet through a file.
 2. ``run`` ships the body by name and its arguments through one pipe per rank, and waits for one report from each.
 3. After the first failure the others get a second more, since the victims of a broken collective often report before
    the culprit. Then all ranks are killed, and the next run starts a fresh set.

Neighbouring ranks have hash seeds of their own, as torchrun's ranks have, so a decision that follows the order of a set
is seen: ranks come from one fork server a seed.

State survives from body to body in one set: a body that makes process groups destroys them. The ranks' environment is
that of the first run in the session; later changes to ``os.environ`` do not reach them.
"""

import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from tests import rank_process
from tests.rank_process import Place, Report

# The ranks are forks of a process that has these: nothing here starts a thread or touches CUDA. The second list is slow
# to import, and loaded only when the tests that pytest has collected import it too; the third makes kernels of what it
# finds in the environment, so that it is loaded where all ranks have the same.
PRELOAD = ["torch", "torch.distributed", "triton", "pytest"]
PRELOAD_IF_USED = ["transformers.modeling_utils"]
PRELOAD_IF_INTERPRETED = ["helix.llm"]
HASH_SEEDS = (1, 2)  # each costs a process that loads all that
START_TIMEOUT_S = 120.0
GRACE_S = 1.0
CLOSE_TIMEOUT_S = 10.0
STACK_TIMEOUT_S = 5.0  # a rank that has died, or whose processor others have, writes none or late
# What a rank's error looks like when another rank has left it alone.
VICTIM = re.compile(r"Dist\w*Error|NCCL|gloo|Connection (closed|reset)|Broken pipe|[Tt]imed? ?out")


class RankFailure(AssertionError):
    """At least one rank raised, died or hung; the message shows each of them, the likeliest culprit first."""


class Rank(NamedTuple):
    """A rank as its pool sees it."""

    place: Place
    process: BaseProcess
    pipe: Connection


class RankPool:
    """``world_size`` rank processes in one default process group: NCCL where each has a GPU of its own, else gloo.

    ``device_type`` is "cuda" or "cpu" accordingly; on "cuda" every rank's current device is its own GPU.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.device_type = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
        self._ranks: list[Rank] = []

    def run(self, body: Callable[..., Any], *args: Any, timeout_s: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call ``body(*args, **kwargs)`` in every rank and return the results in rank order.

        ``body`` stands at the top of a test file or of an importable module. Arguments and results are pickled;
        tensors among them are on the CPU. The test's warning filters hold in the ranks too. Skips the test when every
        rank skips.

        Raises:
            RankFailure: a rank raised, died, or did not report within ``timeout_s`` seconds.
        """
        __tracebackhide__ = True
        if "<locals>" in body.__qualname__:
            raise TypeError(f"{body.__qualname__} must stand at the top of its file: the ranks find it by name")
        where = (body.__module__, sys.modules[body.__module__].__file__, body.__qualname__)
        message = pickle.dumps((*where, list(warnings.filters), pickle.dumps((args, kwargs))))
        try:
            if not self._ranks:
                self._start()
            for rank in self._ranks:
                with suppress(OSError):  # it has died since; its report will say so
                    rank.pipe.send_bytes(message)
            reports = self._gather(f"{body.__module__}.{body.__qualname__}", timeout_s)
            results = [pickle.loads(report.result) for report in reports if report.kind == "done"]
        except BaseException:  # pytest's own time-out and Ctrl-C leave ranks behind that are still busy
            self.kill()
            raise
        if not results:
            pytest.skip(reports[0].headline)
        return results

    def close(self) -> None:
        """Let every rank leave its process group, then end it."""
        for rank in self._ranks:
            with suppress(OSError):
                rank.pipe.send_bytes(b"")
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every rank now; the next run starts a fresh set."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join(CLOSE_TIMEOUT_S)
            rank.pipe.close()
            shutil.rmtree(rank.place.folder, ignore_errors=True)
        self._ranks = []

    def _start(self) -> None:
        context = get_context("forkserver")
        folder = Path(tempfile.mkdtemp(prefix="helix-ranks-"))
        for number in range(self.world_size):
            place = Place(number, self.world_size, self.device_type, folder)
            place.stack_file.touch()
            pipe, its_pipe = context.Pipe()
            process = context.Process(target=rank_process.serve, args=(place, its_pipe), daemon=True)
            _start_process(process, HASH_SEEDS[number % len(HASH_SEEDS)])
            its_pipe.close()  # so that the pipe ends when the rank does
            self._ranks.append(Rank(place, process, pipe))
        self._gather("joining the process group", START_TIMEOUT_S)

    def _gather(self, what: str, timeout_s: float) -> list[Report]:
        """Wait for one report per rank and return them in rank order, or raise RankFailure."""
        __tracebackhide__ = True
        reports: dict[int, Report] = {}
        pending = list(self._ranks)
        deadline = time.monotonic() + timeout_s
        while pending and (ready := wait([rank.pipe for rank in pending], max(0.0, deadline - time.monotonic()))):
            for rank in [rank for rank in pending if rank.pipe in ready]:
                pending.remove(rank)
                report = reports[rank.place.rank] = _receive(rank)
                if report.kind in ("raised", "died"):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        kinds = {report.kind for report in reports.values()}
        if pending or kinds not in ({"done"}, {"skipped"}):
            after = f"{timeout_s:g} s" if kinds <= {"done", "skipped"} else f"{GRACE_S:g} s after the first failure"
            message = _describe(reports, pending, after)
            raise RankFailure(f"{message}\n\n({what} on {self.world_size} ranks, {self.device_type})")
        return [reports[number] for number in range(self.world_size)]


_fork_servers: dict[int, forkserver.ForkServer] = {}
_starting = threading.Lock()


def _start_process(process: BaseProcess, hash_seed: int) -> None:
    """Start a process from the fork server of a hash seed; ``multiprocessing`` itself knows one server only."""
    with _starting:
        for seed in HASH_SEEDS:
            server = _fork_servers.setdefault(seed, forkserver.ForkServer())
            interpreted = PRELOAD_IF_INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else []
            used = [name for name in (*PRELOAD_IF_USED, *interpreted) if name in sys.modules]
            server.set_forkserver_preload(PRELOAD + used)
            with patch.dict(os.environ, PYTHONHASHSEED=str(seed)):
                server.ensure_running()
        connect = _fork_servers[hash_seed].connect_to_new_process
        with patch.object(forkserver, "connect_to_new_process", connect):
            process.start()


def _receive(rank: Rank) -> Report:
    try:
        return Report(*rank.pipe.recv())
    except (EOFError, OSError):
        rank.process.join(CLOSE_TIMEOUT_S)
        code = rank.process.exitcode or 0
        return Report("died", f"with exit code {code}" + (f" ({signal.Signals(-code).name})" if code < 0 else ""))


def _describe(reports: dict[int, Report], running: list[Rank], after: str) -> str:
    """One line for each rank that failed, the likeliest culprit first; then tracebacks, and where the others are."""

    def suspicion(number: int) -> tuple[int, int]:
        report = reports[number]
        return (0 if report.kind == "died" else 2 if VICTIM.search(report.headline) else 1, number)

    failed = sorted((number for number in reports if reports[number].kind != "done"), key=suspicion)
    lines = [f"rank {number} {reports[number].kind} {reports[number].headline}" for number in failed]
    if running:
        lines.append(f"still running after {after}: rank {', '.join(str(rank.place.rank) for rank in running)}")
    lines += [
        f"\nrank {number}:\n{reports[number].traceback.rstrip()}" for number in failed if reports[number].traceback
    ]
    return "\n".join([*lines, *_stacks(running)])


def _stacks(running: list[Rank]) -> list[str]:
    """Ask ranks that are busy, perhaps inside a collective, where they are."""
    for rank in running:
        with suppress(ProcessLookupError):
            os.kill(rank.process.pid or 0, signal.SIGUSR1)
    harness = f'  File "{rank_process.__file__}"'
    deadline = time.monotonic() + STACK_TIMEOUT_S
    while not all(harness in rank.place.stack_file.read_text() for rank in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    stacks = [rank.place.stack_file.read_text().split(harness)[0].rstrip() for rank in running]
    return [f"\nrank {rank.place.rank} is here:\n{stack}" for rank, stack in zip(running, stacks, strict=True)]
