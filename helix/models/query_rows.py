"""Up to how many rows the ranks of a KVP group share out a step's queries, by heads; pure integers, no torch."""

from __future__ import annotations

from .spec import ModelSpec

LATENCY_BYTES = 12 << 20
"""Weights that a GPU reads while a gather of one row is on its way: 2.8 us between two H200."""
BYTES_FOR_BYTE = 16
"""Weights that a GPU reads while another rank sends it a byte: 267 GB/s between two H200."""


def rows_that_share(spec: ModelSpec, kvp: int, *, element_bytes: int, q_b_bytes: int) -> int:
    """Return how many rows a step may have at most for a gather to be cheaper than every rank's making all queries.

    0 where queries are not made of latents. What the sizes are of: activations and the keys' up-projection, and the
    queries' own.
    """
    latent = spec.latent
    if kvp == 1 or latent is None or latent.q_rank is None:
        return 0
    others = (1 - 1 / kvp) * spec.num_heads
    saved = latent.q_dim * latent.q_rank * q_b_bytes + latent.plain_dim * latent.rank * element_bytes
    return rows_that_pay(others * saved, others * spec.head_dim * element_bytes)


def rows_that_pay(saved_bytes: float, row_bytes: float) -> int:
    """Return how many rows a step may have at most for a gather to be cheaper than reading the weights it saves.

    Args:
        saved_bytes: of weights that a rank need not read.
        row_bytes: of one row's queries, that it receives.
    """
    return max(0, int((saved_bytes - LATENCY_BYTES) / (BYTES_FOR_BYTE * row_bytes)))
