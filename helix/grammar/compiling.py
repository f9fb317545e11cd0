"""Compiles what requests ask answers to be, in processes that end when a grammar takes too long or too much.

The process behind it takes seconds to start: ``start`` does that, or the first grammar, and others where it has died.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock

from .vocabulary import Vocabulary

SECONDS = 5.0
"""How long a grammar may take to compile."""
MEMORY_BYTES = 1 << 30
MAX_COMPILED_BYTES = 1 << 24
MAX_CACHED_BYTES = 1 << 27
NUM_AT_ONCE = 2
MAX_WAITING = 16
"""Grammars that may be compiled or wait for it where strangers ask; at ``SECONDS`` each the last one waits for 40 s."""
_START_S = 120.0  # for the process to load the compiler
_GRACE_S = 5.0
_INHERITED = ("PATH", "PYTHON", "LD_", "HOME", "LANG", "LC_", "TMPDIR", "VIRTUAL_ENV")  # as names begin
_SCRIPT = Path(__file__).with_name("worker.py")


class CompilerBusy(RuntimeError):
    """So many grammars wait to be compiled that no more are taken."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary, from any thread. What was compiled is kept, ``MAX_CACHED_BYTES`` of it.

    Args:
        vocabulary: the model's.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock, self._starting = Lock(), Lock()
        self._made: OrderedDict[tuple[str, str], Future[bytes]] = OrderedDict()
        self._sizes: dict[tuple[str, str], int] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._end: weakref.finalize[..., GrammarCompiler] | None = None

    def begin(self, structure: Mapping[str, str], *, max_waiting: int | None = None) -> Future[bytes]:
        """Begin to compile what ``structured`` returned, unless it is there. The result is xgrammar's own form of it.

        Raises:
            ValueError: where nothing can be compiled here; the future has it, in one line, for a grammar that cannot.
            CompilerBusy: where ``max_waiting`` others are being compiled, or wait for it.
        """
        self._vocabulary.require()
        [key] = structure.items()
        with self._lock:
            found = self._made.get(key)
            if found is None:
                waiting = sum(not each.done() for each in self._made.values())
                if max_waiting is not None and waiting >= max_waiting:
                    raise CompilerBusy(f"{waiting} grammars are being compiled or wait, at most {max_waiting} may")
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(NUM_AT_ONCE, "grammar")
                found = self._made[key] = self._threads.submit(self._compile, *key)
            self._made.move_to_end(key)
        found.add_done_callback(lambda future: self._keep(key, future))
        return found

    def start(self) -> None:
        """Start the process before a grammar comes, where any could be compiled; RuntimeError where it fails."""
        if self._vocabulary.problem is None:
            with self._starting:
                self._ensure_started()

    def compile(self, structure: Mapping[str, str]) -> bytes:
        """Return what ``begin`` begins; ValueError, in one line, for a grammar that cannot be compiled."""
        return self.begin(structure).result()

    def close(self) -> None:
        """End the process, if there is one; a grammar that comes later starts another."""
        if self._end is not None:
            self._end()

    def _keep(self, key: tuple[str, str], future: Future[bytes]) -> None:
        """Keep what was compiled, and forget what was not asked for longest; or forget a failure."""
        with self._lock:
            if self._made.get(key) is not future:
                return
            if future.exception() is not None:
                del self._made[key]
                return
            self._sizes[key] = len(future.result())
            while sum(self._sizes.values()) > MAX_CACHED_BYTES:
                oldest = next(each for each in self._made if each in self._sizes)
                del self._made[oldest], self._sizes[oldest]

    def _compile(self, kind: str, text: str) -> bytes:
        setting = f"sampling.structured_outputs.{kind}"
        ours, theirs = socket.socketpair()
        with theirs:
            self._send(theirs)
        with Connection(ours.detach()) as connection:
            began = time.monotonic()
            try:
                limits = f"{SECONDS} {MEMORY_BYTES} {MAX_COMPILED_BYTES}"
                connection.send_bytes(f"{limits} {kind}\n{text}".encode())
                answer = connection.recv_bytes() if connection.poll(SECONDS + _GRACE_S) else b""
            except (EOFError, OSError):
                answer = b""
        if not answer and time.monotonic() - began >= SECONDS:
            raise ValueError(f"{setting} is not compiled after {SECONDS:g} s; make it simpler")
        if not answer:
            raise ValueError(f"{setting} needs more than {MEMORY_BYTES >> 20} MiB to compile, or broke its compiler")
        if answer[:1] == b"-":
            raise ValueError(f"{setting} is refused: {answer[1:].decode(errors='replace')}")
        return answer[1:]

    def _send(self, handle: socket.socket) -> None:
        """Give a socket to the process; RuntimeError where there is none, and none can be started."""
        with self._starting:
            try:
                socket.send_fds(self._ensure_started(), [b"\0"], [handle.fileno()])
            except OSError:  # it died since it was looked at
                self.close()
                self._control = self._start()
                socket.send_fds(self._control, [b"\0"], [handle.fileno()])

    def _ensure_started(self) -> socket.socket:
        """Start the process where there is none; return what leads to it. The caller holds ``_starting``."""
        if self._control is None or self._process is None or self._process.poll() is not None:
            self.close()
            self._control = self._start()
        return self._control

    def _start(self) -> socket.socket:
        """Start the process; return what leads to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        self._end = weakref.finalize(self, _hang_up, self._process, ours)
        problem: OSError | None = None
        try:
            with Connection(os.dup(ours.fileno())) as begin:
                begin.send_bytes(self._vocabulary.packed())
            ours.settimeout(_START_S)  # no sooner: a handle with one takes no more than the socket's buffer holds
            ready = ours.recv(1) == b"\0"
        except OSError as error:  # a time-out, too
            ready, problem = False, error
        if not ready:
            self._process.kill()  # which the next grammar finds, and starts another
            self._process.wait()
            why = "what it said is above" if problem is None else str(problem)
            raise RuntimeError(f"the process that compiles grammars did not start: {why}") from problem
        return ours


def _environment() -> dict[str, str]:
    """Return what the process gets of ours: what Python needs, and no key or token that may stand beside it."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(_INHERITED)}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _hang_up(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """End the process, which leaves when nobody can ask it any more."""
    control.close()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
