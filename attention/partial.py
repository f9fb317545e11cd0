"""Partial attention over the local shard: the interface, and the choice of a back end."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from .rows import Rows

BACKENDS = ("auto", "reference", "triton")
_log = logging.getLogger(__name__)


class PartialAttention(Protocol):
    """Attends R rows to the local shard of a paged cache. No communication."""

    def __call__(
        self, q_RQD: torch.Tensor, pages: torch.Tensor, rows: Rows, scale: float, *, value_dim: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return partial results over S disjoint ranges of the local shard, S >= 1.

        Splits are partials like those of ranks, and the exchange merges both at once.

        Args:
            q_RQD: [R, Q, D]; query head i reads KV head i // (Q / K). Heads are packed, rows may be strided.
            pages: [P, 2, K, block_size, D], one layer's pages, K before V; or [P, 1, 1, block_size, D], latents, which
                are K and, their first elements, V of all heads. The last two dims are packed.
            rows: the step's rows; their K and V are already appended.
            scale: what the scores are multiplied by, positive, usually D ** -0.5.
            value_dim: W, elements of a latent that are V; None where V has a plane of its own, as wide as K.

        Returns:
            out [S, R, Q, W], each normalised over its own range, in q's dtype where S is 1 and float32 else; and lse
            [S, R, Q] float32, natural log. A row that sees nothing of a range has out = 0 and lse = -inf there.
        """
        ...


def select_backend(name: str, device: torch.device, *, pdl: bool = False) -> PartialAttention:
    """Return the back end of that name; ``auto`` is triton on CUDA and reference elsewhere, and is logged.

    ``pdl`` lets kernels launch programmatically dependent, where the back end has kernels.

    Raises:
        ValueError: when the name is none of BACKENDS, or triton is asked for where it cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention.backend = {name!r} must be one of {', '.join(BACKENDS)}")
    if name == "auto":
        name = "triton" if device.type == "cuda" else "reference"
        _log.info("attention.backend=auto: %s, for device %s", name, device.type)
    if name == "reference":
        from .reference import partial_attention

        return partial_attention
    from .split_kv import SplitKV, can_run

    if not can_run(device):
        raise ValueError(
            f"attention.backend = triton needs a CUDA device (or TRITON_INTERPRET=1), not {device.type}; "
            "use attention.backend=reference"
        )
    return SplitKV(device, pdl=pdl)
