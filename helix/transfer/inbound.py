"""What the decode group keeps of a request that is asked for: what may be written for it, until all writers have ended.

States and windows that arrive are no batch slot's: those that a lost writer may still write keep no sequence from
running. As many may be on their way as there are batch slots; where all are lost like that, nothing more is asked for.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from ..engine import Engine
from ..request import Sequence
from ..states.records import StateRecords
from .protocol import First


@dataclass(eq=False)
class Inbound:
    """A request that is asked for, or will be.

    Attributes:
        arrival: its number among ``Arrivals``; None where the model has neither states nor windows.
        waits_for: the writers that have not reported an end state.
        unknown: those whose end is unknown.
        problems: what the writers that are not done said.
    """

    seq: Sequence
    arrival: int | None = None
    waits_for: set[int] = field(default_factory=set)
    first: First | None = None
    first_heard: float = 0.0
    unknown: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Quarantine:
    """What some writers may still write: pages, pages of windows, and the number of its arrival; None without."""

    pages: list[tuple[int, int]]
    windows: list[int]
    writers: set[int]
    arrival: int | None = None


class Arrivals:
    """The numbers of sequences whose states or windows are on their way, alike on all ranks; the lowest goes first.

    Args:
        count: as many as batch slots, which the pool of windows has pages for.
        records: of states, this rank's, by these numbers; None where windows arrive.
    """

    def __init__(self, count: int, records: StateRecords | None) -> None:
        self.count, self._records = count, records
        self._free = list(range(count))

    @classmethod
    def of(cls, engine: Engine) -> Arrivals | None:
        """Return those of an engine; None where the model has neither states nor windows."""
        states = engine.runner.decoder.states
        if states is None and engine.scheduler.windows is None:
            return None
        return cls(engine.runner.max_batch, None if states is None else states.records)

    @property
    def num_free(self) -> int:
        """Numbers that nobody has."""
        return len(self._free)

    @property
    def what(self) -> str:
        """What arrives, in words."""
        return "windows" if self._records is None else "states"

    def take(self) -> int:
        """Return a number that is free; there must be one."""
        return heapq.heappop(self._free)

    def land(self, number: int, seq: Sequence) -> None:
        """Let a sequence go on behind its prompt, of which all has arrived, and make the number free.

        Whoever has it next is asked for once the device has done this, as with pages.
        """
        if self._records is not None:
            self._records.read(number, seq.batch_slot, seq.prompt_len)
        self.give(number)

    def give(self, number: int) -> None:
        """Make a number free."""
        heapq.heappush(self._free, number)
