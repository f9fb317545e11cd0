"""Latent attention around the kernel that attends: queries into the latent space, what is cached, values out of it.

What every head makes of a token's latent is linear, so the key's up-projection is applied to the query instead, and the
value's to what attention returns (DeepSeek-V2, arXiv 2405.04434, section 2.1). Attention then reads one vector a token,
for all heads, and that is what the cache holds: the latent after its norm, then the key that RoPE has turned.

So a query multiplies 2 C + T elements a token and head. Of keys and values that are made of the latents it would be
P + T + V, at C (P + V) once a token and head: with DeepSeek's sizes 320 for 1,088, which pays from some 170 rows of a
sequence on. Chunks of at least ``attention.expand_rows`` therefore attend to ranges of made keys and values.

Shape letters: R rows, Q query heads of this rank, H those after the exchange; P plain, T turned, C latent elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attention.append import append, rotate
from attention.latent_append import latent_append, latent_queries, turn_queries
from attention.latent_products import MAX_ROWS, latent_append_and_queries, latent_queries_of, latent_values
from attention.pages import Pages
from attention.partial import Workspace
from attention.ranges import PAGE
from attention.widened import gather_latents
from parallel.norm import rms_norm

from .linear import linear, split_linear
from .query_share import QueryShare, rows_of
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
    share: QueryShare | None = None,
    plain: bool = False,
    pdl: bool = False,
    chunk: bool = False,
) -> torch.Tensor:
    """Append what owned rows are to cache, and return the queries of all rows in the latent space: [R, Q, C + T].

    With ``plain`` they are queries of made keys: [R, Q, P + T]. With ``share`` it is collective over the KVP group.

    Args:
        flat: [S, R, q_rank or Q (P + T), then C + T], as the projection ``qkv`` leaves it: the sum over S, of the rows
            that this rank projects.
        cos, sin: [R, T / 2] float32, of those rows.
        pages: [P, 1, 1, block_size, C + T], one layer's pages.
        slot: [R] int64, page * block_size + offset, or -1.
        weights: the layer's, by role.
        latent: sizes.
        num_heads: Q.
        interleaved: see ``rotate``.
        share: which queries this rank makes; None where it makes all.
        plain: do not take queries into the latent space.
        pdl: launch programmatically dependent, where a projection has a kernel of its own.
        chunk: see ``split_linear``.
    """
    few = flat.is_cuda and flat.shape[1] <= MAX_ROWS
    if few and share is None and not plain and latent.q_rank is None:
        return latent_append_and_queries(
            flat,
            weights["k_up"].unflatten(0, (num_heads, latent.plain_dim)),
            cos,
            sin,
            pages,
            slot,
            latent_norm=weights["latent_norm"],
            eps=latent.eps,
            interleaved=interleaved,
            pdl=pdl,
        )
    first = append_latents(flat, cos, sin, pages, slot, weights, latent, interleaved=interleaved, pdl=pdl)
    heads = (0, num_heads) if share is None else share.heads
    k_up = rows_of(weights["k_up"], heads, latent.plain_dim)
    absorbs = not plain and (share is None or share.absorbs)
    parts = first.unsqueeze(0)
    if latent.q_rank is not None:
        q_b = rows_of(weights["q_b"], heads, latent.q_dim)
        if absorbs:
            parts = split_linear(first, q_b, pdl=pdl, chunk=chunk)
        else:
            parts = linear(first, q_b, pdl=pdl, chunk=chunk).unsqueeze(0)
    if absorbs:
        q = _absorbed(parts, k_up, cos, sin, latent, interleaved=interleaved, pdl=pdl)
    else:
        q = parts[0].unflatten(-1, (-1, latent.q_dim))
        q = _turned(q, cos, sin, latent, interleaved=interleaved, pdl=pdl) if plain else q
    if share is None:
        return q
    q = share.gather(q)
    if plain or absorbs:
        return q
    parts = q.flatten(1).unsqueeze(0)
    return _absorbed(parts, weights["k_up"], share.cos, share.sin, latent, interleaved=interleaved, pdl=pdl)


def append_latents(
    flat: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: Pages,
    slot: torch.Tensor,
    weights: Mapping[str, Any],
    latent: Latent,
    *,
    interleaved: bool,
    pdl: bool,
) -> torch.Tensor:
    """Append what owned rows are to cache; return what queries are made of, [R, q_rank or Q (P + T)]."""
    if flat.is_cuda:
        return latent_append(
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
    [flat] = flat
    first, compressed, turning = flat.split((flat.shape[-1] - pages.shape[-1], latent.rank, latent.turned_dim), -1)
    turned = rotate(turning.unsqueeze(1), cos, sin, interleaved=interleaved)
    cached = torch.cat((rms_norm(compressed, weights["latent_norm"], latent.eps).unsqueeze(1), turned), -1)
    append(cached, None, pages, slot)
    return first if latent.q_rank is None else rms_norm(first, weights["q_a_norm"], latent.eps)


def _absorbed(
    parts: torch.Tensor,
    k_up: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    latent: Latent,
    *,
    interleaved: bool,
    pdl: bool,
) -> torch.Tensor:
    """Take queries [S, R, Q (P + T)], which are their sum over S, into the latent space: [R, Q, C + T]."""
    k_up = k_up.unflatten(0, (-1, latent.plain_dim))
    if parts.is_cuda and parts.shape[1] <= MAX_ROWS:
        return latent_queries_of(parts, k_up, cos, sin, interleaved=interleaved, pdl=pdl)
    [first] = parts
    first = first.unflatten(-1, (-1, latent.q_dim))
    absorbed = torch.bmm(first[..., : latent.plain_dim].transpose(0, 1), k_up)
    if parts.is_cuda:
        return latent_queries(first, absorbed, cos, sin, interleaved=interleaved, pdl=pdl)
    turned = rotate(first[..., latent.plain_dim :], cos, sin, interleaved=interleaved)
    return torch.cat((absorbed.transpose(0, 1), turned), -1)


def _turned(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, latent: Latent, *, interleaved: bool, pdl: bool
) -> torch.Tensor:
    """Turn the last elements of plain queries [R, Q, P + T]."""
    if q.is_cuda:
        turn_queries(q, cos, sin, interleaved=interleaved, pdl=pdl)
        return q
    own = q[..., : latent.plain_dim]
    return torch.cat((own, rotate(q[..., latent.plain_dim :], cos, sin, interleaved=interleaved)), -1)


class MadeOfLatents:
    """A workspace in which the keys and values of all heads of this rank are made, for one layer at a time.

    Args:
        latent: sizes.
        num_heads: Q.
        capacity: tokens that it holds, rounded up to whole pages.

    Attributes:
        capacity: tokens.
        workspace: what attention reads.
    """

    def __init__(
        self, latent: Latent, num_heads: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = -(-capacity // PAGE) * PAGE
        self._rank = latent.rank
        widths = num_heads * latent.plain_dim, num_heads * latent.value_dim, latent.rank + latent.turned_dim
        self._k, self._v, self._latents = (
            torch.empty((self.capacity, width), dtype=dtype, device=device) for width in widths
        )
        k, v = self._k.unflatten(1, (num_heads, -1)), self._v.unflatten(1, (num_heads, -1))
        self.workspace = Workspace(k, v, self._latents[:, latent.rank :], PAGE)

    def make(self, tokens: torch.Tensor, pages: Pages, weights: Mapping[str, Any]) -> None:
        """Make keys and values of tokens in a layer's pages: see ``attention.ranges.Filling.tokens``."""
        num_tokens = tokens.shape[0]
        latents = self._latents[:num_tokens]
        gather_latents(pages, tokens, latents)
        for role, made in (("k_up", self._k), ("v_up", self._v)):
            torch.mm(latents[:, : self._rank], weights[role].T, out=made[:num_tokens])


def values_of(merged: torch.Tensor, v_up: torch.Tensor, latent: Latent, *, pdl: bool = False) -> torch.Tensor:
    """Return the values [R, H, value_dim] of what attention returned in the latent space, [R, H, C].

    v_up is [H value_dim, C], of the same heads.
    """
    per_head = v_up.unflatten(0, (merged.shape[1], latent.value_dim))
    if merged.is_cuda and merged.shape[0] <= MAX_ROWS:
        return latent_values(merged, per_head, pdl=pdl)
    return torch.bmm(merged.transpose(0, 1), per_head.mT).transpose(0, 1)
