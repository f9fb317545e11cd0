"""Where commands wait on rank 0 until the next step: bounded, and safe to fill from any thread."""

from __future__ import annotations

import threading
from collections import deque


class Full(Exception):
    """The inbox holds as many commands as it may; try again later."""


class Inbox:
    """Encoded commands, in the order in which they came.

    Args:
        limit: commands that may wait; None bounds nothing.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._commands: deque[bytes] = deque()
        self._changed = threading.Condition()

    def put(self, command: bytes, *, always: bool = False) -> None:
        """Add a command; ``always`` is for those that make room, such as an abort.

        Raises:
            Full: where as many wait as may.
        """
        with self._changed:
            if self._limit is not None and not always and len(self._commands) >= self._limit:
                raise Full(f"{self._limit} requests wait to be added")
            self._commands.append(command)
            self._changed.notify()

    def take(self, wait_s: float) -> list[bytes]:
        """Return all commands; where there are none, wait for one so many seconds at most."""
        with self._changed:
            if not self._commands and wait_s > 0:
                self._changed.wait(wait_s)
            taken = list(self._commands)
            self._commands.clear()
            return taken
