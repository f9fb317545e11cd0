"""What the cache did, counted; equal on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class CacheCounters:
    """Counters since they were last replaced. A block counts once, on whichever rank it lies.

    Attributes:
        blocks_reused: found and used where they were, those taken over included.
        blocks_copied: found in part, used by others too: their matched tokens were copied.
        blocks_onboarded: copied from the host to a device page.
        blocks_offloaded: copied from a device page to the host.
        blocks_evicted: lost their last page, on the device or on the host, to make room.
        preemptions: sequences put back because decode ran out of pages.
        tokens_reused: tokens that admissions found in the cache, resumptions included.
        tokens_missed: tokens that admissions left to compute, the last one of each prompt included.
    """

    blocks_reused: int = 0
    blocks_copied: int = 0
    blocks_onboarded: int = 0
    blocks_offloaded: int = 0
    blocks_evicted: int = 0
    preemptions: int = 0
    tokens_reused: int = 0
    tokens_missed: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return asdict(self)
