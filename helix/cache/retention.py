"""How long a request wants its blocks kept: a priority for a range of its tokens, for some time or for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PRIORITY = 100
DEFAULT_PRIORITY = 35


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """The priority of the blocks that begin in tokens [start, end) of a sequence, output included.

    Attributes:
        start, end: positions in tokens; ``end`` None is the sequence's end, wherever it comes to lie.
        priority: 0 to 100; blocks of lower priority are evicted first.
        duration_s: seconds after which the blocks return to priority 35; None is never. Time is rank 0's, as all ranks
            last shared it (``CacheControl.advance``).

    Raises:
        ValueError: when a value is outside its range.
    """

    start: int = 0
    end: int | None = None
    priority: int = DEFAULT_PRIORITY
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"retention.start = {self.start} must be at least 0")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"retention.end = {self.end} must be above retention.start = {self.start}")
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"retention.priority = {self.priority} must lie in 0..{MAX_PRIORITY}")
        if self.duration_s is not None and not self.duration_s > 0:
            raise ValueError(f"retention.duration_s = {self.duration_s} must be positive")

    def covers(self, position: int) -> bool:
        """Return whether a position lies in the range."""
        return self.start <= position and (self.end is None or position < self.end)


def at(ranges: Sequence[Retention], position: int) -> Retention | None:
    """Return the range that decides for a block that begins at a position: the last that covers it."""
    return next((each for each in reversed(ranges) if each.covers(position)), None)
