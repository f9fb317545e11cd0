"""The model of cost beside a run: the TTL that it predicts for what was measured."""

from __future__ import annotations

import logging
from typing import Any

from .llm import LLM
from .plan.cost import CostModel
from .plan.hardware import Hardware
from .prediction import find_hardware

_log = logging.getLogger(__name__)


def cost_of(llm: LLM, hardware: Hardware) -> CostModel:
    """Return the model of what the steps of a running model cost on a machine."""
    return CostModel(llm.footprint, hardware, llm.config.scheduler.prefill_chunk)


def predicted(llm: LLM) -> dict[str, Any] | None:
    """Return the TTL that the model of cost predicts for the sequences that the last call ran; on rank 0.

    None where the machine has no constants, nothing was decoded, or drafts make steps of several tokens.
    """
    config, metrics = llm.config, llm.metrics
    hardware = find_hardware(config, llm.launch.device)
    done = metrics.num_requests - metrics.num_errors
    if hardware is None or not done or not len(metrics.ttl_s) or config.speculative.method != "none":
        return None
    context = sum(metrics.tokens_per_rank) / done - metrics.decode_tokens / done / 2
    batch = min(done, config.scheduler.max_batch)
    time = cost_of(llm, hardware).decode(max(context, 1.0), batch)
    _log.info(
        "TTL %.2f ms measured (median), %.2f predicted for %d sequences of %d tokens (%s, %s)",
        metrics.ttl_s.percentile_s(50) * 1e3, time.us / 1e3, batch, context, hardware.name, hardware.source,
    )  # fmt: skip
    return {
        "ttl_ms": time.us / 1e3,
        "context": context,
        "batch": batch,
        "bound_by": time.bound_by,
        "hardware": hardware.name,
        "source": hardware.source,
    }
