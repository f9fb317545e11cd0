"""The HTTP process as rank 0 sees it: commands come from it into the inbox, and what is new goes back.

The step loop waits for it nowhere. When it is gone the world is closed: nobody could hear what it computes.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence

from ..commands import Add, Close
from ..commands import decode as decode_command
from ..commands import encode as encode_command
from ..inbox import Inbox
from ..llm import LLM
from ..request import RequestOutput, StreamEvent, TokenLogprobs
from . import wire
from .framing import read_frame
from .outbox import Outbox
from .stats import progress_of, stats_of

_log = logging.getLogger(__name__)

PUBLISH_S = 1.0  # between two sets of counters while requests run; scrapes are rarer


class Clients:
    """Rank 0's end of the socket pair.

    Args:
        sock: a stream socket; the HTTP process has the other end.

    ``open`` is called once the model is loaded: until then no request comes.

    Attributes:
        inbox: where the commands wait for the next step.
        has_gone: True once the HTTP process has ended, or closed its end.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.inbox = Inbox()  # HTTP bounds what may live, and says 429
        self.has_gone = False
        self._sock, self._outbox = sock, Outbox(sock)
        self._num_sent: dict[int, int] = {}  # log-probabilities that were sent, of those that asked for any
        self._published_s = 0.0
        self._llm: LLM | None = None
        self._thread = threading.Thread(target=self._read, name="clients", daemon=True)
        self._thread.start()

    def open(self, llm: LLM, ready: wire.Ready) -> None:
        """Say that requests are taken."""
        self._llm = llm
        self.tell(ready)

    def tell(self, message: wire.Down) -> None:
        """Send a message."""
        self._outbox.send(wire.encode(message))

    def publish(self, llm: LLM, events: Sequence[StreamEvent]) -> None:
        """Send what is new of a turn, and the counters where they are due: also with the end of the last that ran."""
        ended = {event.index: event.output for event in events if event.output is not None}
        deltas = [self._delta(llm, event, ended.get(event.index)) for event in events]
        now = time.monotonic()
        if now - self._published_s >= PUBLISH_S or (ended and not llm.engine.scheduler.running):
            self._published_s = now
            self.tell(wire.News(deltas, progress_of(llm), stats_of(llm)))
        elif deltas:
            self.tell(wire.News(deltas))

    def close(self, wait_s: float) -> None:
        """Send what is left and hang up."""
        self._outbox.close(wait_s)
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(1.0)
        self._sock.close()

    def _delta(self, llm: LLM, event: StreamEvent, output: RequestOutput | None) -> wire.Delta:
        if output is None and (seq := llm.find(event.index)) is not None:
            output = seq.output
        delta = wire.Delta(event.index, event.token_ids, event.text)
        if output is not None and event.token_ids:
            self._add_chances(delta, output)
        if event.output is not None:
            end = event.output
            delta.end = wire.End(end.finish_reason, end.prompt_tokens, end.cached_tokens, end.error, end.stop_reason)
            self._num_sent.pop(event.index, None)
        return delta

    def _add_chances(self, delta: wire.Delta, output: RequestOutput) -> None:
        """Add the log-probabilities of its tokens, and with the first of them those of the prompt."""
        if output.logprobs is None and output.prompt_logprobs is None:
            return
        start = self._num_sent.get(delta.index, 0)
        stop = self._num_sent[delta.index] = start + len(delta.token_ids)
        if output.prompt_logprobs is not None and not start:
            delta.prompt = [None if each is None else _chance(each) for each in output.prompt_logprobs]
        if output.logprobs is not None:
            delta.logprobs = [_chance(each) for each in output.logprobs[start:stop]]

    def _admitted(self, frame: bytes) -> bytes:
        """Return a command as all ranks get it: what rank 0 alone keeps of it stays here, in this thread's time."""
        command = decode_command(frame)
        if self._llm is None or not isinstance(command, Add) or not command.sampling.structured_outputs:
            return frame
        return encode_command(self._llm.admit(command))

    def _read(self) -> None:
        try:
            while (frame := read_frame(self._sock)) is not None:
                self.inbox.put(self._admitted(frame), always=True)
        except Exception:
            _log.exception("what clients ask for can not be read any more: the server ends")
        self.has_gone = True
        self.inbox.put(encode_command(Close(abort=True)), always=True)


def _chance(each: TokenLogprobs) -> wire.TokenChance:
    return wire.TokenChance(each.token_id, each.logprob, each.top)
