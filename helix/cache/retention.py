"""How long a request wants its blocks kept: a priority for a range of its tokens, for some time or for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import INT64_LIMIT, conforms

MAX_PRIORITY = 100
DEFAULT_PRIORITY = 35
MAX_DURATION_S = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """The priority of the blocks that begin in tokens [start, end) of a sequence, output included.

    Attributes:
        start, end: positions in tokens; ``end`` None is the sequence's end, wherever it comes to lie.
        priority: 0 to 100; blocks of lower priority are evicted first.
        duration_s: seconds after which the blocks return to priority 35, at most 1e9; None is never. Time is rank 0's,
            as all ranks last shared it (``CacheControl.advance``).

    Raises:
        ValueError: when a value is of another type or outside its range.
    """

    start: int = 0
    end: int | None = None
    priority: int = DEFAULT_PRIORITY
    duration_s: float | None = None

    def __post_init__(self) -> None:
        optional = {"end": int | None, "duration_s": float | None}
        for name in ("start", "end", "priority", "duration_s"):
            value = getattr(self, name)
            if not conforms(value, optional.get(name, int)):
                raise ValueError(f"retention.{name} = {value!r} must be a number")
        if not 0 <= self.start < INT64_LIMIT:
            raise ValueError(f"retention.start = {self.start} must lie in [0, 2**63)")
        if self.end is not None and not self.start < self.end < INT64_LIMIT:
            raise ValueError(f"retention.end = {self.end} must be above retention.start = {self.start} and below 2**63")
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"retention.priority = {self.priority} must lie in 0..{MAX_PRIORITY}")
        if self.duration_s is not None and not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(
                f"retention.duration_s = {self.duration_s} must be positive and at most {MAX_DURATION_S:g}; "
                "leave it out to keep the priority"
            )

    def covers(self, position: int) -> bool:
        """Return whether a position lies in the range."""
        return self.start <= position and (self.end is None or position < self.end)


def at(ranges: Sequence[Retention], position: int) -> Retention | None:
    """Return the range that decides for a block that begins at a position: the last that covers it."""
    return next((each for each in reversed(ranges) if each.covers(position)), None)
