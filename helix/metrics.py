"""What a run measured: TTFT, TTL, rates, how evenly the cache was filled. Clocks only report, they decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .cache.counters import CacheCounters
from .speculative.counters import SpeculativeCounters

PERCENTILES = (50, 90, 99)


def percentiles_ms(times_s: Sequence[float]) -> dict[str, float] | None:
    """Return mean and percentiles, in milliseconds, of times in seconds; None without any."""
    if not times_s:
        return None
    times = np.asarray(times_s) * 1e3
    summary = {f"p{p}": float(np.percentile(times, p)) for p in PERCENTILES}
    return {"mean": float(times.mean()), **summary}


@dataclass(slots=True)
class RunMetrics:
    """Counters of the requests since they were last reset. Times are seconds of this rank's own clock.

    Attributes:
        cache: what the cache did.
        occupancy: gives the pages of each KVP rank by use, as they are now.
        prefill_tokens: prompt tokens computed, recomputation after preemption included.
        prefill_total: prompt tokens that have to be computed, as far as known.
        decode_tokens: output tokens made.
        ttft_s: from a request's arrival to its first token, one entry a request.
        ttl_s: between two tokens of a request, one entry a token after its first.
        padding_rows: rows that the target computed for nobody, to fill a graph.
        speculative: what speculation did; None without it.
        transfer: gives what KV transfers did; None where there are none.
        tokens_per_rank: tokens whose K and V each KVP rank held when their requests ended, summed over requests.
    """

    tokens_per_rank: list[int]
    cache: CacheCounters = field(default_factory=CacheCounters)
    occupancy: Callable[[], list[dict[str, int]]] = list
    transfer: Callable[[], dict[str, Any]] | None = None
    prefill_tokens: int = 0
    prefill_total: int = 0
    decode_tokens: int = 0
    num_requests: int = 0
    num_errors: int = 0
    num_steps: int = 0
    padding_rows: int = 0
    elapsed_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    ttl_s: list[float] = field(default_factory=list)
    speculative: SpeculativeCounters | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures in the form of metrics.json."""
        return {
            "requests": self.num_requests,
            "errors": self.num_errors,
            "steps": self.num_steps,
            "padding_rows": self.padding_rows,
            "preemptions": self.cache.preemptions,
            "prefill_tokens": self.prefill_tokens,
            "output_tokens": self.decode_tokens,
            "elapsed_s": self.elapsed_s,
            "output_tokens_per_s": self.decode_tokens / self.elapsed_s if self.elapsed_s else 0.0,
            "ttft_ms": percentiles_ms(self.ttft_s),
            "ttl_ms": percentiles_ms(self.ttl_s),
            "tokens_per_kvp_rank": self.tokens_per_rank,
            "cache": {**self.cache.as_dict(), "pages_per_kvp_rank": self.occupancy()},
            "speculative": None if self.speculative is None else self.speculative.as_dict(),
            **({} if self.transfer is None else {"transfer": self.transfer()}),
        }
