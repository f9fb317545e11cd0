"""Latent attention around the kernel that attends: queries into the latent space, what is cached, values out of it.

What every head makes of a token's latent is linear, so the key's up-projection is applied to the query instead, and the
value's to what attention returns (DeepSeek-V2, arXiv 2405.04434, section 2.1). Attention then reads one vector a token,
for all heads, and that is what the cache holds: the latent after its norm, then the key that RoPE has turned.

Shape letters: R rows, Q query heads of this rank, H those after the exchange; P plain, T turned, C latent elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from attention.append import append, rotate
from attention.latent_append import latent_append, latent_queries
from attention.pages import Pages

from .linear import linear
from .spec import Latent


def project(
    flat: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: Pages,
    slot: torch.Tensor,
    weights: Mapping[str, Any],
    latent: Latent,
    *,
    num_heads: int,
    interleaved: bool,
    pdl: bool = False,
) -> torch.Tensor:
    """Append what owned rows are to cache, and return the queries of all rows in the latent space: [R, Q, C + T].

    Args:
        flat: [S, R, q_rank or Q (P + T), then C + T], as the projection ``qkv`` leaves it: the sum over S.
        cos, sin: [R, T / 2] float32.
        pages: [P, 1, 1, block_size, C + T], one layer's pages.
        slot: [R] int64, page * block_size + offset, or -1.
        weights: the layer's, by role.
        latent: sizes.
        num_heads: Q.
        interleaved: see ``rotate``.
        pdl: launch programmatically dependent, where a projection has a kernel of its own.
    """
    k_up = weights["k_up"].unflatten(0, (num_heads, latent.plain_dim))
    if flat.is_cuda:
        first = latent_append(
            flat,
            cos,
            sin,
            pages,
            slot,
            latent_norm=weights["latent_norm"],
            q_norm=weights.get("q_a_norm"),
            eps=latent.eps,
            interleaved=interleaved,
            pdl=pdl,
        )
    else:
        [flat] = flat
        first, compressed, turning = flat.split((flat.shape[-1] - pages.shape[-1], latent.rank, latent.turned_dim), -1)
        turned = rotate(turning.unsqueeze(1), cos, sin, interleaved=interleaved)
        cached = torch.cat((_norm(compressed, weights["latent_norm"], latent).unsqueeze(1), turned), -1)
        append(cached, None, pages, slot)
        if latent.q_rank is not None:
            first = _norm(first, weights["q_a_norm"], latent)
    if latent.q_rank is not None:
        first = linear(first, weights["q_b"], pdl=pdl)
    first = first.unflatten(-1, (num_heads, latent.q_dim))
    absorbed = torch.bmm(first[..., : latent.plain_dim].transpose(0, 1), k_up)
    if flat.is_cuda:
        return latent_queries(first, absorbed, cos, sin, interleaved=interleaved, pdl=pdl)
    turned = rotate(first[..., latent.plain_dim :], cos, sin, interleaved=interleaved)
    return torch.cat((absorbed.transpose(0, 1), turned), -1)


def values_of(merged: torch.Tensor, v_up: torch.Tensor, latent: Latent) -> torch.Tensor:
    """Return the values [R, H, value_dim] of what attention returned in the latent space, [R, H, C].

    v_up is [H value_dim, C].
    """
    per_head = v_up.unflatten(0, (merged.shape[1], latent.value_dim))
    return torch.bmm(merged.transpose(0, 1), per_head.mT).transpose(0, 1)


def _norm(x: torch.Tensor, weight: torch.Tensor, latent: Latent) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, latent.eps)
