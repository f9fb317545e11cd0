"""What stands in front of the steps: the interface of the engine, and of the receiver that takes its place.

Requests come in and go out here, and nowhere else. Every method is collective over the world: all ranks call it in the
same order with equal arguments, so whatever one rank alone can see has to be shared before.
"""

from __future__ import annotations

from typing import Protocol

from .metrics import RunMetrics
from .request import Sequence, StreamEvent


class Front(Protocol):
    """Runs sequences to their end."""

    @property
    def metrics(self) -> RunMetrics:
        """The counters since they were last reset."""

    @property
    def has_work(self) -> bool:
        """True while any sequence waits, is on its way, or runs."""

    @property
    def trouble(self) -> str:
        """What is wrong with others that take part, and what becomes of requests by it; empty where nothing is."""

    def reset_metrics(self) -> RunMetrics:
        """Start a new set of counters and return it."""

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""

    def find(self, index: int) -> Sequence | None:
        """Return the sequence of an index; None where it has ended, or never was."""

    def abort(self, index: int) -> list[StreamEvent]:
        """End a request with reason abort; return its last event, none where it has ended before."""

    def listen(self) -> bytes:
        """Return what rank 0 has heard of others, for ``hear``. Rank 0 alone calls it; it may wait for some 20 ms."""

    def advance(self, now: float) -> None:
        """Tell the time, in seconds of one clock for all ranks."""

    def hear(self, news: bytes) -> list[StreamEvent]:
        """Act on rank 0's news and return what is new of the sequences that go on or end by them."""

    def step(self) -> list[StreamEvent]:
        """Compute one step and return what is new of the sequences that got a token or ended."""

    def abort_all(self) -> None:
        """Drop every sequence without a word; its pages are free or cached."""

    def close(self) -> None:
        """Leave whoever else takes part."""
