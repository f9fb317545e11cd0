"""What the transfers of a run did, counted; equal on every decode rank except for times."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..metrics import Durations


@dataclass(slots=True)
class TransferCounters:
    """Counters since the run began.

    Attributes:
        requests: prompts that the prefill group computed and this group went on with.
        tokens_received: their tokens that came over.
        tokens_cached: their tokens that were cached here and were not sent.
        short: prompts that this group computed itself, since little of them was missing.
        retried: requests whose transfer failed and that this group computed itself.
        failed: requests that failed with their transfer.
        pages_quarantined: pages taken out of use because a late write might still reach them.
        pages_released: those of them that came back, once nobody could write them any more.
        handover_s: from hearing of the first token to going on with it, in seconds, one entry a request.
    """

    requests: int = 0
    tokens_received: int = 0
    tokens_cached: int = 0
    short: int = 0
    retried: int = 0
    failed: int = 0
    pages_quarantined: int = 0
    pages_released: int = 0
    handover_s: Durations = field(default_factory=Durations)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures in the form of metrics.json."""
        figures = asdict(self)
        figures["handover_ms"] = figures.pop("handover_s").as_dict_ms()
        return figures
