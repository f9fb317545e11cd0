"""What a run measured: TTFT, TTL, rates, how evenly the cache was filled. Clocks only report, they decide nothing."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from .cache.counters import CacheCounters
from .request import ERROR, STOP, Chunk
from .request import Sequence as RunningSequence
from .speculative.counters import SpeculativeCounters

PERCENTILES = (50, 90, 99)
_GROWTH = math.log(1.01)
_SHORTEST_S = 1e-6


class Durations:
    """Durations in buckets that grow by 1 %: however many there are, they take the same room.

    Attributes:
        total_s: their sum, in seconds.
    """

    __slots__ = ("_counts", "_num", "total_s")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._num = 0
        self.total_s = 0.0

    def __len__(self) -> int:
        return self._num

    def add(self, duration_s: float, times: int = 1) -> None:
        """Count a duration, in seconds, so many times; what is below a microsecond counts as none."""
        bucket = math.floor(math.log(duration_s / _SHORTEST_S) / _GROWTH) if duration_s > _SHORTEST_S else -1
        self._counts[bucket] = self._counts.get(bucket, 0) + times
        self._num += times
        self.total_s += duration_s * times

    def mean_s(self) -> float:
        """Return the mean, in seconds, exactly."""
        return self.total_s / self._num

    def percentile_s(self, percent: float) -> float:
        """Return a percentile, in seconds, within 0.5 %."""
        rank, seen = math.ceil(self._num * percent / 100), 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= rank:
                return _middle_s(bucket)
        raise ValueError("there are no durations")

    def cumulative(self, bounds_s: Sequence[float]) -> list[int]:
        """Return how many durations lie at or below each bound; bounds in seconds, ascending."""
        counts = [0] * len(bounds_s)
        for bucket, number in self._counts.items():
            place = bisect_left(bounds_s, _middle_s(bucket))
            if place < len(counts):
                counts[place] += number
        return list(accumulate(counts))

    def as_dict_ms(self) -> dict[str, float] | None:
        """Return mean and percentiles in milliseconds; None without any."""
        if not self._num:
            return None
        return {"mean": self.mean_s() * 1e3} | {f"p{p}": self.percentile_s(p) * 1e3 for p in PERCENTILES}


def _middle_s(bucket: int) -> float:
    return 0.0 if bucket < 0 else _SHORTEST_S * math.exp((bucket + 0.5) * _GROWTH)


@dataclass(slots=True)
class RunMetrics:
    """Counters of the requests since they were last reset. Times are seconds of this rank's own clock.

    Attributes:
        cache: what the cache did.
        occupancy: gives the pages of each KVP rank by use, as they are now.
        prefill_tokens: prompt tokens computed, recomputation after preemption included.
        prefill_total: prompt tokens that have to be computed, as far as known.
        decode_tokens: output tokens made.
        ends: requests that ended, by reason.
        ttft_s: from a request's arrival to its first token, one entry a request.
        ttl_s: between two tokens of a request, one entry a token after its first.
        queue_s: from a request's arrival to its first admission.
        latency_s: from a request's arrival to its end.
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
    ends: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0
    padding_rows: int = 0
    elapsed_s: float = 0.0
    ttft_s: Durations = field(default_factory=Durations)
    ttl_s: Durations = field(default_factory=Durations)
    queue_s: Durations = field(default_factory=Durations)
    latency_s: Durations = field(default_factory=Durations)
    speculative: SpeculativeCounters | None = None

    @property
    def num_errors(self) -> int:
        """Requests that ended with an error."""
        return self.ends[ERROR]

    def note_arrival(self, seq: RunningSequence, now: float) -> None:
        """Count a request that has come, at a time of this rank's clock."""
        seq.arrived_s = now
        self.num_requests += 1

    def note_refusal(self) -> None:
        """Count a request that could not run."""
        self.num_requests += 1
        self.ends[ERROR] += 1

    def note_cut(self, reason: str, num_tokens: int) -> None:
        """Note that a request counted under a reason ended at a stop string, so many tokens before its last one."""
        self.ends[reason] -= 1
        self.ends[STOP] += 1
        self.decode_tokens -= num_tokens

    def note_admission(self, seq: RunningSequence, now: float) -> None:
        """Note that a request began to run for the first time, with ``num_computed`` tokens found cached."""
        self.prefill_total -= seq.num_computed
        self.queue_s.add(now - seq.arrived_s)

    def note_step(self, chunks: Sequence[Chunk]) -> None:
        """Count a step and the prompt tokens that it computed."""
        self.num_steps += 1
        self.prefill_tokens += sum(c.stop - c.start for c in chunks if c.start < c.seq.prompt_len)
        self.prefill_total = max(self.prefill_total, self.prefill_tokens)

    def note_tokens(self, seq: RunningSequence, now: float, count: int) -> None:
        """Note when tokens came; those of one step share the time that it took."""
        self.decode_tokens += count
        if seq.last_token_s is None:
            self.ttft_s.add(now - seq.arrived_s)
            self.ttl_s.add(0.0, count - 1)
        else:
            self.ttl_s.add((now - seq.last_token_s) / count, count)
        seq.last_token_s = now

    def note_end(self, seq: RunningSequence, now: float, local_lens: Sequence[int]) -> None:
        """Note that a request ended, and how many tokens each KVP rank held of it."""
        self.ends[seq.output.finish_reason] += 1
        self.latency_s.add(now - seq.arrived_s)
        self.tokens_per_rank = [sum(pair) for pair in zip(self.tokens_per_rank, local_lens, strict=True)]

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
            "ttft_ms": self.ttft_s.as_dict_ms(),
            "ttl_ms": self.ttl_s.as_dict_ms(),
            "tokens_per_kvp_rank": self.tokens_per_rank,
            "cache": {**self.cache.as_dict(), "pages_per_kvp_rank": self.occupancy()},
            "speculative": None if self.speculative is None else self.speculative.as_dict(),
            **({} if self.transfer is None else {"transfer": self.transfer()}),
        }
