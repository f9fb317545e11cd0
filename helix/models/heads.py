"""Queries, keys and values of heads that are cached as they are: norms, RoPE and append, behind their projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attention.append import append, rope_append, rotate
from attention.pages import Pages
from parallel.norm import rms_norm

from .spec import ModelSpec


def append_and_query(
    flat: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: Pages,
    slot: torch.Tensor,
    weights: Mapping[str, Any],
    spec: ModelSpec,
    *,
    num_heads: int,
    num_kv_heads: int,
    pdl: bool,
) -> torch.Tensor:
    """Rotate queries and keys, append keys and values to their slots, and return the queries: [R, Q, D].

    Args:
        flat: [S, R, (Q + 2 K) * D], summands of the projection; on CPUs one.
        cos, sin: [R, rotary_dim / 2] float32.
        pages: the layer's. slot: [R] int64, -1 where another rank stores a row's.
        weights: the layer's; of norms and fixed scales, where it has them.
    """
    interleaved, eps = spec.rope.interleaved, spec.rms_eps
    if flat.is_cuda:
        norms = (weights["q_norm"], weights["k_norm"], eps) if "q_norm" in weights else None
        return rope_append(
            flat, cos, sin, pages, slot, num_heads=num_heads, norms=norms, interleaved=interleaved,
            fixed=weights.get("cache_scales"), pdl=pdl,
        )  # fmt: skip
    q, k, v = flat[0].unflatten(-1, (-1, spec.head_dim)).split((num_heads, num_kv_heads, num_kv_heads), 1)
    if "q_norm" in weights:
        q, k = rms_norm(q, weights["q_norm"], eps), rms_norm(k, weights["k_norm"], eps)
    append(rotate(k, cos, sin, interleaved=interleaved), v, pages, slot, weights.get("cache_scales"))
    return rotate(q, cos, sin, interleaved=interleaved)
