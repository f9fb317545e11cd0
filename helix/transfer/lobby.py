"""Where prefill ranks wait, on the decode group's rank 0, until all of their group have come, agree and are ready."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .channel import Channel, Listener
from .facts import Process, find_mismatch
from .protocol import Hello, Message, Ready, Refuse, Welcome
from .requirements import SAME_SECRET, SECRET_VARIABLE

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Writer:
    """A prefill rank as rank 0 sees it."""

    channel: Channel
    process: Process


@dataclass(frozen=True)
class Party:
    """A prefill group that can write to the pools: its ranks in order, and what processes it knows to have ended."""

    writers: list[Writer]
    ended: list[Process]


class Lobby:
    """Lets in a prefill group, and later another in its place.

    Args:
        listener: where they come from.
        facts: what both groups must agree on, by setting.
        welcome: what a group is told that agrees.
    """

    def __init__(self, listener: Listener, facts: Mapping[str, Any], welcome: Welcome) -> None:
        self.listener, self._facts, self._welcome = listener, facts, welcome
        self._waiting: list[Channel] = []
        self._welcomed = False
        self._reset()

    def poll(self, timeout_s: float = 0.0, lost: Sequence[Process] = ()) -> Party | None:
        """Return a group once all its ranks are ready; waits ``timeout_s`` at most for something new.

        Args:
            timeout_s: in seconds.
            lost: ranks of an earlier group, of which those are asked that are on their machines.

        Raises:
            ValueError: when a rank does not agree, or leaves; all who had come are told, and others may come.
        """
        self._waiting += self.listener.poll(timeout_s)
        for channel in list(self._waiting):
            messages = channel.messages()
            if messages or channel.lost is not None:
                self._waiting.remove(channel)
                self._greet(channel, messages[0] if messages else None)
        for rank, (_, channel) in self._hellos.items():
            for message in channel.messages():
                if isinstance(message, Ready):
                    self._ready[rank] = message
            if channel.lost is not None and rank not in self._ready:
                self._refuse(f"prefill rank {rank} left before it was ready: {channel.lost}")
        if self._hellos and len(self._hellos) == self._world_size and not self._welcomed:
            self._welcomed = True
            for _, channel in self._hellos.values():
                channel.send(msgspec.structs.replace(self._welcome, lost=list(lost)))
        if not self._hellos or len(self._ready) < self._world_size:
            return None
        writers = [Writer(channel, hello.process) for _, (hello, channel) in sorted(self._hellos.items())]
        party = Party(writers, [process for ready in self._ready.values() for process in ready.ended])
        self._reset()
        return party

    def late(self, timeout_s: float) -> str:
        """Return what to say when no group has come within ``timeout_s`` seconds."""
        refused = f", and {self.listener.num_refused} with another {SECRET_VARIABLE}; {SAME_SECRET}"
        return (
            f"{len(self._hellos)} prefill ranks have come within transfer.connect_timeout_s = {timeout_s:g} s"
            + (f", {len(self._ready)} of them are ready" if self._welcomed else "")
            + (refused if self.listener.num_refused else "; start the prefill group, or raise it")
        )

    def _greet(self, channel: Channel, message: Message | None) -> None:
        """Take in who says hello as it should."""
        mismatch = find_mismatch(self._facts, message.facts) if isinstance(message, Hello) else None
        problem = channel.lost or mismatch
        if problem is None and not isinstance(message, Hello):
            problem = f"it began with a {type(message).__name__}"
        elif isinstance(message, Hello) and self._hellos and self._world_size != message.world_size:
            problem = problem or f"it is one of {message.world_size} ranks, and ranks of {self._world_size} have come"
        elif isinstance(message, Hello) and message.rank in self._hellos:
            problem = problem or f"rank {message.rank} has come already"
        if problem is None:
            assert isinstance(message, Hello)
            self._hellos[message.rank] = message, channel
            return
        _log.warning("refused a prefill rank at %s: %s", channel.name, problem)
        channel.send(Refuse(problem))
        channel.close()
        if mismatch is not None:
            self._refuse(mismatch)

    def _refuse(self, reason: str) -> None:
        """Send away all who have come, and raise."""
        for channel in [*self._waiting, *(channel for _, channel in self._hellos.values())]:
            channel.send(Refuse(reason))
            channel.close()
        self._waiting.clear()
        self._reset()
        raise ValueError(reason)

    def _reset(self) -> None:
        self._hellos: dict[int, tuple[Hello, Channel]] = {}
        self._ready: dict[int, Ready] = {}
        self._welcomed = False

    @property
    def _world_size(self) -> int:
        return next(iter(self._hellos.values()))[0].world_size
