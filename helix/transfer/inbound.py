"""What the decode group keeps of a request that is asked for: what may be written for it, until all writers have ended.

A record of states is no batch slot's: one that a lost writer may still write keeps no sequence from running. There are
as many as batch slots; where all are lost like that, nothing more can be asked for.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from ..request import Sequence
from ..states.cache import StateCache
from ..states.records import StateRecords
from .protocol import First


@dataclass(eq=False)
class Inbound:
    """A request that is asked for, or will be.

    Attributes:
        record: where its states arrive; None where the model has none.
        waits_for: the writers that have not reported an end state.
        unknown: those whose end is unknown.
        problems: what the writers that are not done said.
    """

    seq: Sequence
    record: int | None = None
    waits_for: set[int] = field(default_factory=set)
    first: First | None = None
    first_heard: float = 0.0
    unknown: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Quarantine:
    """Pages that some writers may still write, and the record of states that they may; None without."""

    pages: list[tuple[int, int]]
    writers: set[int]
    record: int | None = None


class Records:
    """Which records of states are free, alike on all ranks; the lowest goes first.

    Attributes:
        memory: this rank's.
        count: of all of them.
    """

    def __init__(self, memory: StateRecords) -> None:
        self.memory, self.count = memory, memory.memory.shape[1]
        self._free = list(range(self.count))

    @classmethod
    def of(cls, states: StateCache | None) -> Records | None:
        """Return those of a rank's states; None where the model has none."""
        return None if states is None or states.records is None else cls(states.records)

    @property
    def num_free(self) -> int:
        """Records that nobody writes."""
        return len(self._free)

    def take(self) -> int:
        """Return one that is free; there must be one."""
        return heapq.heappop(self._free)

    def give(self, record: int) -> None:
        """Make one free."""
        heapq.heappush(self._free, record)
