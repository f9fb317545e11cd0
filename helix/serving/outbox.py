"""Frames on their way out of rank 0, whose step loop waits for nobody."""

from __future__ import annotations

import select
import socket
import threading
from collections import deque

from .framing import pack


class Outbox:
    """Sends frames in order. One that the socket takes at once is sent at once; a thread sends what is left over.

    Args:
        sock: a stream socket whose other end reads on; sending never blocks it for the other users of the socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._left: deque[memoryview] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def send(self, payload: bytes) -> None:
        """Send a payload; nothing where the other end has gone, which whoever reads from it finds out."""
        data = memoryview(pack(payload))
        with self._changed:
            if self._closed:
                return
            if not self._left:
                data = data[self._try(data) :]
            if data:
                self._left.append(data)
                self._changed.notify()

    def close(self, wait_s: float) -> None:
        """Send what is left, for so many seconds at most, and no more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left or self._closed, wait_s)
            self._closed = True
            self._changed.notify_all()
        self._thread.join(1.0)

    def _try(self, data: memoryview) -> int:
        """Return how many bytes the socket took."""
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self._closed = True
            self._left.clear()
            return len(data)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left or self._closed)
                if self._closed:
                    return
            select.select([], [self._sock], [], 1.0)
            with self._changed:
                while self._left:
                    data = self._left.popleft()
                    count = self._try(data)
                    if count < len(data):
                        self._left.appendleft(data[count:])
                        break
                self._changed.notify_all()
