"""/metrics: the world's counters under ``helix:``, with the suffixes and units that vLLM's dashboards have."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..request import ABORT, ERROR, LENGTH, STOP
from .link import Link
from .wire import BOUNDS_S, Histogram, Setup, Stats

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_GAUGES = (
    ("num_requests_running", "Requests that run.", "num_running"),
    ("num_requests_waiting", "Requests that wait to run.", "num_waiting"),
    ("kv_cache_usage_perc", "The part of the fullest rank's pages that sequences hold, 0 to 1.", "cache_usage"),
)
_COUNTERS = (
    ("prompt_tokens", "Prompt tokens, computed or found in the cache.", "prompt_tokens"),
    ("generation_tokens", "Tokens made.", "generation_tokens"),
    ("prefix_cache_queries", "Tokens that were looked up in the cache.", "queried_tokens"),
    ("prefix_cache_hits", "Tokens that were found in it.", "hit_tokens"),
    ("num_preemptions", "Sequences put back because pages ran out.", "preemptions"),
    ("num_steps", "Steps computed.", "steps"),
)
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "From a request's arrival to its first token.", "ttft"),
    ("inter_token_latency_seconds", "Between two tokens of a request.", "inter_token"),
    ("e2e_request_latency_seconds", "From a request's arrival to its end.", "latency"),
    ("request_queue_time_seconds", "From a request's arrival to its first step.", "queue"),
)


class WorldCollector(Collector):
    """Turns the last counters that came from rank 0 into metrics.

    Args:
        link: where they come.
        setup: names the model.
    """

    def __init__(self, link: Link, setup: Setup) -> None:
        self._link, self._model = link, setup.served_name

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; none before the world is ready."""
        stats, ready = self._link.stats, self._link.ready
        if stats is None or ready is None:
            return
        limits = ready.limits
        info = GaugeMetricFamily(
            "helix:cache_config_info", "The cache.", labels=["model_name", "block_size", "num_gpu_blocks"]
        )
        blocks = limits.num_pages * limits.placement.kvp
        info.add_metric([self._model, str(limits.placement.block_size), str(blocks)], 1)
        yield info
        for name, does, field in _GAUGES:
            gauge = GaugeMetricFamily(f"helix:{name}", does, labels=["model_name"])
            gauge.add_metric([self._model], getattr(stats, field))
            yield gauge
        for name, does, field in _COUNTERS:
            counter = CounterMetricFamily(f"helix:{name}", does, labels=["model_name"])
            counter.add_metric([self._model], getattr(stats, field))
            yield counter
        yield self._ends(stats)
        for name, does, field in _HISTOGRAMS:
            yield self._histogram(name, does, getattr(stats, field))

    def _ends(self, stats: Stats) -> Metric:
        ends = CounterMetricFamily(
            "helix:request_success", "Requests that ended.", labels=["model_name", "finished_reason"]
        )
        for reason in (STOP, LENGTH, ABORT, ERROR):
            ends.add_metric([self._model, reason], stats.ends.get(reason, 0))
        return ends

    def _histogram(self, name: str, does: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"helix:{name}", does, labels=["model_name"])
        bounds = [*(str(bound) for bound in BOUNDS_S), "+Inf"]
        buckets = list(zip(bounds, [*histogram.counts, histogram.num], strict=True))
        family.add_metric([self._model], buckets=buckets, sum_value=histogram.total_s)
        return family


class Exposition:
    """The text of /metrics."""

    def __init__(self, link: Link, setup: Setup) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(WorldCollector(link, setup))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
