"""Figures of requests whose tokens came at known times: throughput, TTFT and TTL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def figures_of(times: Sequence[Sequence[float]], arrived_s: Sequence[float], began_s: float) -> dict[str, float]:
    """Return throughput and percentiles.

    Args:
        times: of each request, when each of its tokens came, in seconds; one at least.
        arrived_s: when each arrived.
        began_s: when the first of all could.
    """
    ttft_ms = [(each[0] - arrived) * 1e3 for each, arrived in zip(times, arrived_s, strict=True)]
    ttl_ms = np.concatenate([np.diff(each) for each in times]) * 1e3
    num_tokens = sum(len(each) for each in times)
    figures = {"tokens/s": num_tokens / (max(each[-1] for each in times) - began_s)}
    for name, values in (("TTFT ms", ttft_ms), ("TTL ms", ttl_ms)):
        for percent in (50, 90, 99):
            figures[f"{name} p{percent}"] = float(np.percentile(values, percent)) if len(values) else 0.0
    return figures
