"""The world as the HTTP process sees it: commands go to rank 0, and what is new of each call comes back.

A client that reads slowly holds nothing up: what comes for it meanwhile is merged into one piece a choice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import msgspec

from ..commands import Abort, Add, Close
from ..commands import encode as encode_command
from ..request import LENGTH
from . import wire
from .errors import ApiError, gone, stalled
from .framing import next_frame, pack

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Piece:
    """What is new of one choice of a call."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[wire.TokenChance] = field(default_factory=list)
    end: wire.End | None = None
    prompt: list[wire.TokenChance | None] = field(default_factory=list)

    def add(self, delta: wire.Delta | Piece) -> None:
        """Append what came later."""
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.end = delta.end or self.end
        self.prompt += delta.prompt

    def drop_answer(self) -> None:
        """Leave what it has of the prompt, and that it ended: nothing more was asked for."""
        self.token_ids, self.text, self.logprobs = [], "", []
        if self.end is not None:
            self.end = msgspec.structs.replace(self.end, finish_reason=LENGTH, stop_reason=None)


class Call:
    """The requests of one HTTP call: its choices, in their order.

    Attributes:
        indices: the requests' names in the world.
        progress: of prompts that are being computed, by choice.
    """

    def __init__(self, link: Link, indices: Sequence[int]) -> None:
        self.indices = list(indices)
        self.progress: dict[int, wire.Progress] = {}
        self._link = link
        self._choice_of = {index: choice for choice, index in enumerate(indices)}
        self._open = set(indices)
        self._pieces: dict[int, Piece] = {}
        self._problem: ApiError | None = None
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """True while any choice goes on, or has a piece that was not taken."""
        return bool(self._open or self._pieces)

    async def take(self, wait_s: float | None = None) -> dict[int, Piece]:
        """Return what is new by choice; nothing where that takes longer than ``wait_s`` seconds.

        Raises:
            ApiError: where the world has ended meanwhile.
        """
        if not (self._pieces or self._problem):
            self._changed.clear()
            try:
                async with asyncio.timeout(wait_s):  # Python 3.11's wait_for may lose that it was cancelled
                    await self._changed.wait()
            except TimeoutError:
                return {}
        if self._problem is not None:
            raise self._problem
        pieces, self._pieces = self._pieces, {}
        return pieces

    def push(self, delta: wire.Delta) -> None:
        """Take what came of one of its requests."""
        choice = self._choice_of[delta.index]
        self._pieces.setdefault(choice, Piece()).add(delta)
        self.progress.pop(choice, None)
        if delta.end is not None:
            self._open.discard(delta.index)
        self._changed.set()

    def note(self, progress: wire.Progress) -> None:
        """Take how far a prompt is."""
        self.progress[self._choice_of[progress.index]] = progress

    def fail(self, problem: ApiError) -> None:
        """End it with an error."""
        self._problem = problem
        self._changed.set()

    def close(self) -> None:
        """Forget it; its requests that still run are aborted on all ranks."""
        self._link.drop(self.indices, self._open)
        self._open.clear()


class Link:
    """The HTTP process's end of the socket pair.

    Args:
        reader, writer: of the socket.

    Attributes:
        setup: what HTTP needs to begin; None before it has come.
        ready: what the world is; None while it loads.
        stats: the last counters.
        is_draining: True once no more requests are taken.
        has_gone: True once the world has ended.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._calls: dict[int, Call] = {}
        self._num_tokens: dict[int, int] = {}  # of the prompts of those
        self._numbers = count()
        self._heard_s = time.monotonic()
        self._drained: asyncio.TimerHandle | None = None
        self.setup: wire.Setup | None = None
        self.set_up = asyncio.Event()
        self._is_ready, self._gone = asyncio.Event(), asyncio.Event()
        self.ready: wire.Ready | None = None
        self.stats: wire.Stats | None = None
        self.is_draining = self.has_gone = False

    @property
    def num_live(self) -> int:
        """Requests that wait or run."""
        return len(self._calls)

    @property
    def silent_s(self) -> float:
        """Seconds since the world was last heard of; an idle one says something every second."""
        return time.monotonic() - self._heard_s

    @property
    def is_stalled(self) -> bool:
        """True while the world has been silent for too long."""
        return self.setup is not None and self.ready is not None and self.silent_s > self.setup.serving.stall_timeout_s

    def new_indices(self, number: int) -> list[int]:
        """Return names for so many requests."""
        return [next(self._numbers) for _ in range(number)]

    def submit(self, adds: Sequence[Add]) -> Call:
        """Send requests to the world.

        Raises:
            ApiError: where it takes none: it loads, drains, has ended, or has as many as may live.
        """
        self.require_open(len(adds), sum(add.prompt_len for add in adds))
        commands = encoded(adds)
        call = Call(self, [add.index for add in adds])
        for add, command in zip(adds, commands, strict=True):
            self._calls[add.index], self._num_tokens[add.index] = call, add.prompt_len
            self._writer.write(pack(command))
        return call

    def require_open(self, num_requests: int, num_tokens: int = 0) -> None:
        """Raise ApiError unless so many requests, with prompts of so many tokens together, may come now."""
        if self.has_gone:
            raise gone()
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after_s=30)
        if self.setup is None or self.ready is None:
            raise ApiError(503, "the model is being loaded", code="loading", retry_after_s=5)
        if self.is_stalled:
            raise stalled(self.silent_s)
        serving, live_tokens = self.setup.serving, sum(self._num_tokens.values())
        if self.num_live + num_requests > serving.max_live:
            what = f"{self.num_live} answers are being made or wait, and serve.max_live = {serving.max_live}"
        elif live_tokens and live_tokens + num_tokens > serving.max_live_tokens:
            what = f"{live_tokens} tokens of prompts are there, and serve.max_live_tokens = {serving.max_live_tokens}"
        else:
            return
        raise ApiError(429, f"{what}; try again later", code="overloaded", retry_after_s=1)

    def drop(self, indices: Sequence[int], running: set[int]) -> None:
        """Forget requests, and abort those that run."""
        for index in indices:
            self._forget(index)
            if index in running and not self.has_gone:
                self._writer.write(pack(encode_command(Abort(index))))

    async def until_ready(self) -> None:
        """Wait until steps can run, or never will."""
        await self._is_ready.wait()

    async def until_gone(self) -> None:
        """Wait until the world has ended."""
        await self._gone.wait()

    async def run(self) -> None:
        """Hear what rank 0 says until it hangs up; then every call that is open ends with an error."""
        watching = asyncio.create_task(self._watch())
        try:
            while (frame := await next_frame(self._reader)) is not None:
                self._heard_s = time.monotonic()
                self._take(wire.decode(frame))
        finally:
            watching.cancel()
            self._hang_up()

    def _hang_up(self) -> None:
        self.has_gone = True
        self._fail_all(gone())
        for event in (self.set_up, self._is_ready, self._gone):
            event.set()
        if self._drained is not None:
            self._drained.cancel()
        self._writer.close()

    async def _watch(self) -> None:
        """End the calls that are open with an error while the world is silent for too long."""
        while True:
            was_stalled = self.is_stalled
            await asyncio.sleep(0.5)
            if was_stalled and self.is_stalled:  # twice: what this process has not read yet breaks a silence too
                self._fail_all(stalled(self.silent_s))

    def _take(self, message: wire.Down) -> None:
        if isinstance(message, wire.News):
            for delta in message.deltas:
                if (call := self._calls.get(delta.index)) is not None:
                    call.push(delta)
                    if delta.end is not None:
                        self._forget(delta.index)
            for progress in message.progress:
                if (call := self._calls.get(progress.index)) is not None:
                    call.note(progress)
            self.stats = message.stats or self.stats
        elif isinstance(message, wire.Setup):
            self.setup = message
            self.set_up.set()
        elif isinstance(message, wire.Ready):
            self.ready = message
            self._is_ready.set()
        else:
            self._drain()

    def _forget(self, index: int) -> None:
        self._calls.pop(index, None)
        self._num_tokens.pop(index, None)

    def _drain(self) -> None:
        if self.is_draining:
            return
        self.is_draining = True
        self._writer.write(pack(encode_command(Close())))
        if self.setup is not None:
            wait_s = self.setup.serving.drain_timeout_s
            _log.info("draining: %d answers have %g s to end", self.num_live, wait_s)
            self._drained = asyncio.get_running_loop().call_later(wait_s, self._cut_off)

    def _cut_off(self) -> None:
        self._fail_all(ApiError(503, "the server has shut down before the answer ended", code="draining"))
        self._writer.write(pack(encode_command(Close(abort=True))))

    def _fail_all(self, problem: ApiError) -> None:
        for call in set(self._calls.values()):
            call.fail(problem)


def encoded(adds: Sequence[Add]) -> list[bytes]:
    """Return the bytes of commands; ApiError where one cannot travel."""
    try:
        return [encode_command(add) for add in adds]
    except ValueError as problem:
        raise ApiError.of(problem) from problem
