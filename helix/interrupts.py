"""Ctrl-C between steps, never inside one.

A step that breaks off in the middle leaves pages that nobody gives back, and an ``LLM`` in a notebook is to go on after
an interrupted ``generate``. So the signal waits for the end of a step; who asks a second time gets it at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Run a block to its end before Ctrl-C raises KeyboardInterrupt.

    It does nothing in other threads, which Python does not interrupt, and where a program handles the signal itself.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
