"""Pages of 8 bits, widened for a while: what the many rows of a chunk attend to, range by range of the local shard.

A kernel that widens what it reads does so again for every tile of rows. A chunk has many, so it pays to widen ranges of
the shard once a chunk and layer, into pages as they are without 8 bits (``ranges``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from .eight_bits import as_float
from .kernels import can_run
from .pages import PageLayout, Pages, QuantizedPages
from .ranges import PAGE

TOKENS = 32  # of a program


@triton.jit(do_not_specialize=["num_tokens"])
def _widen_kernel(
    values, scales, slots, out, num_tokens, page_stride, scale_stride,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """N tokens of one head's keys or values."""
    n, which, d = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1), tl.arange(0, D_PAD)[None, :]
    there = n < num_tokens
    slot = tl.load(slots + n, mask=there, other=0).to(tl.int64)
    page, token = slot // BLOCK_SIZE, which * BLOCK_SIZE + slot % BLOCK_SIZE
    mask = there[:, None] & (d < D)
    byte = tl.load(values + (page * page_stride + token * D)[:, None] + d, mask=mask, other=0)
    scale = tl.load(scales + page * scale_stride + token, mask=there, other=0.0)
    to = out + ((n // PAGE * tl.num_programs(1) + which) * PAGE + n % PAGE).to(tl.int64)[:, None] * D + d
    tl.store(to, (as_float(byte) * scale[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _latents_kernel(
    values, scales, turned, slots, out, num_tokens, page_stride, scale_stride, turned_stride,
    BLOCK_SIZE: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, T: tl.constexpr, T_PAD: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """N tokens' latents, and what RoPE has turned of their keys."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    c, t = tl.arange(0, C_PAD)[None, :], tl.arange(0, T_PAD)[None, :]
    there = n < num_tokens
    slot = tl.load(slots + n, mask=there, other=0).to(tl.int64)
    page, token = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    has_c, has_t = there[:, None] & (c < C), there[:, None] & (t < T)
    byte = tl.load(values + (page * page_stride + token * C)[:, None] + c, mask=has_c, other=0)
    kept = tl.load(turned + (page * turned_stride + token * T)[:, None] + t, mask=has_t, other=0.0)
    scale = tl.load(scales + page * scale_stride + token, mask=there, other=0.0)
    to = out + n.to(tl.int64)[:, None] * (C + T)
    tl.store(to + c, (as_float(byte) * scale[:, None]).to(out.dtype.element_ty), mask=has_c)
    tl.store(to + C + t, kept.to(out.dtype.element_ty), mask=has_t)


def gather_latents(pages: Pages, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """Copy tokens' latents and turned keys together, as they are meant.

    Args:
        pages: one layer's, of latents.
        tokens: [n] int32, their slots: see ``attention.ranges.Filling.tokens``.
        out: [n, C + T] of the model's dtype, packed.
    """
    if not isinstance(pages, QuantizedPages):
        torch.index_select(pages.view(-1, pages.shape[-1]), 0, tokens, out=out)
    elif not can_run(tokens.device):
        out.copy_(pages.tokens(tokens)[:, 0, 0])
    elif tokens.shape[0]:
        assert pages.turned is not None
        num_tokens, rank, turned = tokens.shape[0], pages.values.shape[-1], pages.turned.shape[-1]
        _latents_kernel[(triton.cdiv(num_tokens, TOKENS),)](
            pages.bytes, pages.scales, pages.turned, tokens, out, num_tokens, pages.values.stride(0),
            pages.scales.stride(0), pages.turned.stride(0), BLOCK_SIZE=pages.shape[3], C=rank,
            C_PAD=triton.next_power_of_2(rank), T=turned, T_PAD=triton.next_power_of_2(turned), N=TOKENS, num_warps=8,
        )  # fmt: skip


class WidenedTokens:
    """A workspace in which tokens of one layer are widened at a time.

    Args:
        pages: of what pages.
        capacity: tokens that it holds, rounded up to whole pages.
        device: where they are.

    Attributes:
        capacity: tokens.
        workspace: what attention reads: [P, 2, K, PAGE, D] in the model's dtype.
    """

    def __init__(self, pages: PageLayout, capacity: int, device: torch.device) -> None:
        count = -(-capacity // PAGE)
        self.capacity = count * PAGE
        self.workspace = torch.empty(
            (count, 2, pages.num_kv_heads, PAGE, pages.head_dim), dtype=pages.dtype, device=device
        )

    def make(self, tokens: torch.Tensor, pages: Pages, weights: Mapping[str, Any]) -> None:
        """Widen tokens in a layer's pages: see ``attention.ranges.Filling.tokens``. It needs no weights."""
        assert isinstance(pages, QuantizedPages)
        num_tokens, (kv_heads, block_size, head_dim) = tokens.shape[0], pages.shape[2:]
        if not can_run(tokens.device):
            count = num_tokens // PAGE
            self.workspace[:count] = pages.tokens(tokens).unflatten(0, (count, PAGE)).permute(0, 2, 3, 1, 4)
        elif num_tokens:
            _widen_kernel[(triton.cdiv(num_tokens, TOKENS), 2 * kv_heads)](
                pages.bytes, pages.scales, tokens, self.workspace, num_tokens, pages.values.stride(0),
                pages.scales.stride(0), BLOCK_SIZE=block_size, D=head_dim, D_PAD=triton.next_power_of_2(head_dim),
                N=TOKENS, PAGE=PAGE, num_warps=4,
            )  # fmt: skip
