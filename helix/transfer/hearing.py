"""What rank 0 of the decode group hears of the prefill ranks, as news that it shares with all ranks of its group.

Sockets, clocks and other processes are seen by one rank only. So all that they decide is decided here, on rank 0, and
comes out as values; ``Receiver`` broadcasts them and acts on them alike on every rank.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from .channel import wait_for
from .lobby import Lobby, Writer
from .protocol import Ask, Bye, Cancel, End, First, Progress, pack_array, unpack_array

IDLE_S = 0.02
_log = logging.getLogger(__name__)


class Said(msgspec.Struct, frozen=True, tag=True):
    """A writer's message about a transfer."""

    writer: int
    message: First | End


class Lost(msgspec.Struct, frozen=True, tag=True):
    """The connection to a writer has ended."""

    writer: int
    reason: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A writer's process is known to have ended: nothing that it wrote is still under way."""

    writer: int


class Joined(msgspec.Struct, frozen=True, tag=True):
    """Another prefill group has come; its ranks are writers from number ``first`` on."""

    first: int
    count: int


class Silence(msgspec.Struct, frozen=True, tag=True):
    """Nothing was heard for too long while something was waited for."""


class Heard(msgspec.Struct, frozen=True, tag=True):
    """Something was heard again after a silence."""


class Stuck(msgspec.Struct, frozen=True, tag=True):
    """Sequences have stood for too long because pages are quarantined."""


News = Said | Lost | Ended | Joined | Silence | Heard | Stuck
_encoder = msgspec.msgpack.Encoder(enc_hook=pack_array)
_decoder = msgspec.msgpack.Decoder(list[News], dec_hook=unpack_array)


def encode_news(news: list[News]) -> bytes:
    """Return the bytes of news; none where there are none."""
    return _encoder.encode(news) if news else b""


def decode_news(data: bytes) -> list[News]:
    """Return the news that some bytes hold."""
    return _decoder.decode(data) if data else []


class Hearing:
    """Rank 0's connections to the prefill ranks; on other ranks it has none and is only told to tell.

    Args:
        writers: the prefill ranks, in their order.
        lobby: rank 0's, through which they have come, and others may when they are lost.
        timeout_s: how long they may be silent, and how long sequences may stand.
        vocabulary: token ids are below it.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        writers: list[Writer],
        lobby: Lobby | None,
        *,
        timeout_s: float,
        vocabulary: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writers, self._timeout_s, self._vocabulary = writers, timeout_s, vocabulary
        self._lobby, self._clock = lobby, clock
        self._first = 0  # writers below it are of earlier groups
        self._told_lost: set[int] = set()
        self._told_ended: set[int] = set()
        self._silent = False
        self._last_heard = clock()
        self._stands_since: float | None = None

    def tell(self, message: Ask | Cancel | Bye) -> None:
        """Send a message to every prefill rank."""
        for writer in self._writers[self._first :]:
            writer.channel.send(message)

    def begin_to_wait(self) -> None:
        """Count silence from now on: nothing was waited for before."""
        self._last_heard = self._clock()

    def listen(self, awaited: Mapping[int, int], *, waits: bool, stands: bool, idle: bool) -> list[News]:
        """Return what has happened since the last call.

        Args:
            awaited: the seeds of the requests whose first token is waited for.
            waits: some request is asked for.
            stands: sequences cannot go on because pages are quarantined.
            idle: there is nothing else to do: wait a little for something to read.
        """
        wait_for([writer.channel for writer in self._writers], IDLE_S if idle else 0.0)
        news: list[News] = []
        now, heard, seeds = self._clock(), False, dict(awaited)
        for number, writer in enumerate(self._writers):
            for message in writer.channel.messages():
                heard = True
                if isinstance(message, End) or (isinstance(message, First) and self._is_sound(number, message, seeds)):
                    news.append(Said(number, message))
                elif not isinstance(message, (First, Progress)):
                    _log.warning("dropped a %s from prefill rank %d", type(message).__name__, number)
            news += self._look_after(number, writer)
        self._last_heard = now if heard else self._last_heard
        return news + self._watch(now, heard, waits, stands) + self._let_in()

    def have_left(self, deadline: float) -> bool:
        """Return whether every writer has closed its connection, or had until ``deadline`` of ``time.monotonic``."""
        channels = [writer.channel for writer in self._writers if writer.channel.lost is None]
        wait_for(channels, IDLE_S)
        for channel in channels:
            channel.inbox.clear()
        if time.monotonic() < deadline and any(channel.lost is None for channel in channels):
            return False
        if self._lobby is not None:
            self._lobby.listener.close()
        return True

    def _look_after(self, number: int, writer: Writer) -> list[News]:
        """Return, once each, that a writer's connection is lost and that its process has ended."""
        news: list[News] = []
        if writer.channel.lost and number >= self._first and number not in self._told_lost:
            self._told_lost.add(number)
            news.append(Lost(number, writer.channel.lost))
        if writer.channel.lost and number not in self._told_ended and writer.process.has_ended():
            self._told_ended.add(number)
            news.append(Ended(number))
        return news

    def _let_in(self) -> list[News]:
        """Return that another group has come in the place of one that is lost, and what it knows of the lost ones."""
        if self._lobby is None or max(self._told_lost, default=-1) < self._first:
            return []
        unknown = [number for number in range(len(self._writers)) if number not in self._told_ended]
        try:
            party = self._lobby.poll(lost=[self._writers[number].process for number in unknown])
        except ValueError as problem:
            _log.warning("no prefill group could join: %s", problem)
            return []
        if party is None:
            return []
        for writer in self._writers[self._first :]:
            writer.channel.close()
        ended = [number for number in unknown if self._writers[number].process in party.ended]
        self._told_ended.update(ended)
        self._first = len(self._writers)
        self._writers += party.writers
        self._silent = False
        return [*(Ended(number) for number in ended), Joined(self._first, len(party.writers))]

    def _watch(self, now: float, heard: bool, waits: bool, stands: bool) -> list[News]:
        """Return what the clock says: silence, its end, and sequences that stand for too long."""
        news: list[News] = []
        if self._silent and heard:
            self._silent = False
            news.append(Heard())
        if waits and not self._silent and now - self._last_heard > self._timeout_s:
            self._silent = True
            news.append(Silence())
        self._stands_since = (self._stands_since or now) if stands else None
        if self._stands_since is not None and now - self._stands_since > self._timeout_s:
            self._stands_since = None
            news.append(Stuck())
        return news

    def _is_sound(self, writer: int, first: First, seeds: dict[int, int]) -> bool:
        """Return whether a first token can be one, and wait for it no more; says so in the log where it cannot."""
        problem, ids = "", [first.token, *({} if first.logprobs is None else first.logprobs.top)]
        if first.id not in seeds or writer != self._first:
            problem = "which is not waited for"
        elif not all(0 <= each < self._vocabulary for each in ids):
            problem = f"with ids outside the vocabulary of {self._vocabulary}"
        elif first.seed != seeds[first.id]:
            problem = f"drawn under seed {first.seed}, not {seeds[first.id]}"
        if problem:
            _log.warning("dropped a First from prefill rank %d for request %d, %s", writer, first.id, problem)
            return False
        del seeds[first.id]
        return True
