"""How a rank ends: in one line for bad input, a signal, a lost peer or lack of memory, with a traceback for a defect.

    0    done                    1    failed: a full disk, a lost rank, a defect
    2    bad input               130, 143, 129    ended by SIGINT (Ctrl-C), SIGTERM, SIGHUP

torchrun has an exit code of its own (1, whatever its ranks had) and adds a summary and a traceback of its own. They are
long, so bad input is told to it as well: its summary ends with that line.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from parallel.launch import Launch, NotConnectedError

FAILURE, BAD_INPUT = 1, 2  # exit codes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What gloo and NCCL say where the other side of a connection has gone.
_GONE = re.compile(r"connection (was )?(closed|reset)|broken pipe|socket closed|remote process (has )?exited", re.I)
_NO_MEMORY = "can't allocate memory"  # PyTorch's words on a CPU
_SIZES = "scheduler.prefill_chunk, scheduler.max_batch or cache.num_pages"
_PART_GRACE_S = 2.0
_CRASH_GRACE_S = 1.0
_GRACE_S = 20.0  # a silent rank waits this long for rank 0 to speak; torchrun ends it earlier
_rank_of_part: int | None = None
_last_words: Callable[[], str] | None = None
_on_signal: Callable[[int], bool] | None = None
_speaking = threading.Lock()
_has_spoken = False


class RunFailed(Exception):
    """A run did not do all that it was asked for, and neither its input nor the code is at fault: a disk was full.

    Raised by every rank with the same message, which ends them in that one line and with exit code 1.
    """


def rank() -> int:
    """Return this process's rank as torchrun set it, or in its part of a split world; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if _rank_of_part is None else _rank_of_part


def enter_part(launch: Launch) -> None:
    """Where a world is split, speak for this rank's part of it from now on: rank 0 is then the part's own."""
    global _rank_of_part
    if launch.store is not None:
        _rank_of_part = launch.rank


def leave_part() -> None:
    """Speak for this rank of the whole world again."""
    global _rank_of_part
    _rank_of_part = None


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def say_json(value: Any) -> None:
    """Print a line of JSON on rank 0 for machines: not in a terminal, where it would push away what people read."""
    if not sys.stdout.isatty():
        say(json.dumps(value))


@contextmanager
def last_words(words: Callable[[], str]) -> Iterator[None]:
    """Call ``words`` when this rank ends early meanwhile: it keeps what was computed, and says in a line where that is.

    It must not raise, and may be called by another thread than the one that opened this.
    """
    global _last_words
    _last_words = words
    yield
    _last_words = None  # not on the way out of an error, which is what they are for


@contextmanager
def taking_signals(take: Callable[[int], bool]) -> Iterator[None]:
    """Ask ``take`` what to do at a signal meanwhile: True where it has taken care of it, and this rank goes on.

    It is called by another thread, and must not raise.
    """
    global _on_signal
    _on_signal = take
    try:
        yield
    finally:
        _on_signal = None


def fail(problem: Exception | str, code: int = BAD_INPUT) -> NoReturn:
    """End every rank with exit code 2, or another; rank 0 says why, in one line.

    Called by every rank with the same problem. The others wait a little: torchrun ends all ranks as soon as one has
    ended, and the one that speaks must be first. A rank that outlives the wait is alone with its problem and speaks.
    The first rank of a node that cannot meet the others does not wait.
    In a split world rank 0 of the second part waits a moment for the first part's, which may have the same problem.
    """
    who = ""
    if rank() == 0 and os.environ.get("RANK", "0") != "0":
        time.sleep(_PART_GRACE_S)
    if rank() != 0:
        is_alone = isinstance(problem, NotConnectedError) and os.environ.get("LOCAL_RANK") == "0"
        time.sleep(0 if is_alone else _GRACE_S)
        who = f" on rank {rank()}"
    text = f"error{who}: {problem}"
    _tell_torchrun(text)
    _speak(text)
    _exit(code)


def crash(defect: Exception) -> NoReturn:
    """End this rank with exit code 1 and its traceback, in one write; torchrun ends the others.

    Every rank speaks, since none knows whether it has the cause. One that has only met the end of another is no cause:
    it says so in one line, on rank 0. It then waits a moment: torchrun calls the end that it sees first the cause, and
    this one must come after the one that it met.
    """
    if (peer := _lost_peer(defect)) is not None:
        if rank() == 0:
            _speak(f"error: another rank has ended ({peer})")
    elif (lack := _out_of_memory(defect)) is not None:
        who = f" on rank {rank()}" if rank() else ""
        _speak(f"error{who}: out of memory ({lack}); lower {_SIZES}, or use more ranks")
    else:
        who = f"rank {os.environ['RANK']} failed\n" if "RANK" in os.environ else ""
        _speak(who + "".join(traceback.format_exception(defect)), one_line=False)
    if dist.is_initialized():
        time.sleep(_CRASH_GRACE_S)
    _exit(FAILURE)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """End this rank in one line, spoken by rank 0, when it is sent a signal meanwhile; main thread only.

    A thread does it: the main one may be inside a collective, or wait for a GPU, and then runs no handler.
    """
    global _has_spoken, _last_words
    _has_spoken, _last_words = False, None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, lambda *_: None) for number in heard}
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int) -> None:
    while number := os.read(reader, 1)[0]:
        if number in SIGNALS:
            if _on_signal is not None and _on_signal(number):
                continue
            if rank() == 0:
                _speak(f"error: ended by {signal.Signals(number).name}")
            os._exit(128 + number)


def _speak(text: str, *, one_line: bool = True) -> None:
    """Say why this rank ends, once, and what is kept of its work."""
    global _has_spoken
    with _speaking:
        if _has_spoken:
            return
        _has_spoken = True
        kept = _last_words() if _last_words is not None else ""
        text = " ".join(text.split()) + f"; {kept}" * bool(kept) if one_line else text + kept
        with suppress(OSError):
            sys.stderr.write(text.rstrip("\n") + "\n")
            sys.stderr.flush()


def _tell_torchrun(text: str) -> None:
    """Leave this rank's reason where torchrun looks for the one that it names last, if torchrun started it.

    Not for a rank that has met the end of another: torchrun takes the earliest that is told for the cause.
    """
    if (file := os.environ.get("TORCHELASTIC_ERROR_FILE")) is not None:
        reason = {"message": " ".join(text.split()), "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": reason}), "utf-8")


def _lost_peer(defect: BaseException) -> str | None:
    """Return in a line that another rank was lost, where an error comes of that alone."""
    from helix.lost import RankLost

    return _cause(
        defect, lambda each, text: isinstance(each, RankLost) or (_is_runtime(each) and bool(_GONE.search(text)))
    )


def _out_of_memory(defect: BaseException) -> str | None:
    """Return in a line what could not be had, where an error comes of that."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return _cause(defect, lambda each, text: isinstance(each, kinds) or (_is_runtime(each) and _NO_MEMORY in text))


def _is_runtime(error: BaseException) -> bool:
    return isinstance(error, RuntimeError)


def _cause(defect: BaseException, is_it: Callable[[BaseException, str], bool]) -> str | None:
    cause: BaseException | None = defect
    while cause is not None:
        text = " ".join(str(cause).split()) or type(cause).__name__
        if is_it(cause, text):
            return text if len(text) <= 200 else f"{text[:200]}..."
        cause = cause.__cause__
    return None


def _exit(code: int) -> NoReturn:
    if dist.is_initialized():  # the threads of a process group that others may still use abort an orderly exit
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
