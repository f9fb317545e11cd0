"""What the decode group keeps of a request that is asked for: what may be written for it, until all writers have ended.

States and windows that arrive are no batch slot's: those that a lost writer may still write keep no sequence from
running. As many may be on their way as there are batch slots; where all are lost like that, nothing more is asked for.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from ..engine import Engine
from ..request import Sequence
from ..scheduler import Scheduler
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
        count: as many as batch slots, which the pool of windows has pages for; None where the model has neither, and
            no sequence needs a number.
        records: of states, this rank's, by these numbers; None where windows arrive.
    """

    def __init__(self, count: int | None, records: StateRecords | None) -> None:
        self.count, self._records = count, records
        self._free = list(range(count or 0))

    @classmethod
    def of(cls, engine: Engine) -> Arrivals:
        """Return those of an engine."""
        states = engine.runner.decoder.states
        has_none = states is None and engine.scheduler.windows is None
        return cls(None if has_none else engine.runner.max_batch, None if states is None else states.records)

    @property
    def num_free(self) -> int | None:
        """Numbers that nobody has; None where nobody needs one."""
        return None if self.count is None else len(self._free)

    @property
    def what(self) -> str:
        """What arrives, in words."""
        return "windows" if self._records is None else "states"

    def take(self) -> int | None:
        """Return a number that is free; there must be one, where there are any."""
        return None if self.count is None else heapq.heappop(self._free)

    def land(self, number: int | None, seq: Sequence) -> None:
        """Let a sequence go on behind its prompt, of which all has arrived, and make the number free.

        Whoever has it next is asked for once the device has done this, as with pages.
        """
        if self._records is not None and number is not None:
            self._records.read(number, seq.batch_slot, seq.prompt_len)
        self.give(number)

    def give(self, number: int | None) -> None:
        """Make a number free."""
        if number is not None:
            heapq.heappush(self._free, number)


class Quarantines(dict[int, Quarantine]):
    """What is out of use because a late write might still reach it, by the number of its transfer.

    Args:
        scheduler: whose pages they are.
        arrivals: whose numbers they have.
    """

    def __init__(self, scheduler: Scheduler, arrivals: Arrivals) -> None:
        super().__init__()
        self._scheduler, self._arrivals = scheduler, arrivals

    @property
    def num_pages(self) -> int:
        """Pages that are out of use."""
        return sum(len(each.pages) for each in self.values())

    def put(self, number: int, inbound: Inbound, writers: set[int]) -> int:
        """Take what a request holds out of use until these writers have ended; returns its pages."""
        pages, windows = self._scheduler.detach(inbound.seq)
        self[number] = Quarantine(pages, windows, set(writers), inbound.arrival)
        return len(pages)

    def lift(self, number: int, writer: int) -> int | None:
        """Note that a writer cannot write a transfer's pages any more; returns how many its last one has made free."""
        quarantine = self.get(number)
        if quarantine is None:
            return None
        quarantine.writers.discard(writer)
        if quarantine.writers:
            return None
        del self[number]
        self._scheduler.reattach(quarantine.pages, quarantine.windows)
        self._arrivals.give(quarantine.arrival)
        return len(quarantine.pages)
