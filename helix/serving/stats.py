"""The world's counters as they leave rank 0: once a second, and with the end of the last request that ran."""

from __future__ import annotations

from ..llm import LLM
from ..metrics import Durations
from ..request import Sequence
from .wire import BOUNDS_S, Histogram, Progress, Stats


def stats_of(llm: LLM) -> Stats:
    """Return the counters since the last reset, and the state now, as this rank sees them: alike on all ranks."""
    metrics, scheduler = llm.engine.metrics, llm.engine.scheduler
    pages = metrics.occupancy()
    cache = metrics.cache
    return Stats(
        num_running=len(scheduler.running),
        num_waiting=max(llm.engine.num_live - len(scheduler.running), 0),
        cache_usage=max(each["held"] for each in pages) / llm.num_pages,
        prompt_tokens=metrics.prefill_tokens + cache.tokens_reused,
        generation_tokens=metrics.decode_tokens,
        queried_tokens=cache.tokens_reused + cache.tokens_missed,
        hit_tokens=cache.tokens_reused,
        preemptions=cache.preemptions,
        steps=metrics.num_steps,
        ends=dict(metrics.ends),
        ttft=_histogram(metrics.ttft_s),
        inter_token=_histogram(metrics.ttl_s),
        latency=_histogram(metrics.latency_s),
        queue=_histogram(metrics.queue_s),
        trouble=llm.trouble,
        can_run=not llm.trouble or llm.config.transfer.retry,
    )


def progress_of(llm: LLM) -> list[Progress]:
    """Return how far the prompts are that are being computed here."""
    return [
        Progress(seq.index, seq.num_computed, seq.prompt_len)
        for seq in llm.engine.scheduler.running
        if _computes_prompt(seq)
    ]


def _computes_prompt(seq: Sequence) -> bool:
    return seq.num_computed < seq.prompt_len and len(seq.token_ids) == seq.prompt_len


def _histogram(durations: Durations) -> Histogram:
    return Histogram(durations.cumulative(BOUNDS_S), len(durations), durations.total_s)
