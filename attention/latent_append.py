"""What stands around attention over latents, in two launches: norms, RoPE, the write of owned latents; and the queries.

The same as ``attention.append`` does for keys and values. Every rank rotates with global positions, and only the owner
of a position stores its latent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from parallel.device import early

from .append import load_sum, turns_with
from .eight_bits import as_byte, scale_of
from .pages import Pages, QuantizedPages, planes_of

TURNED_PAIRS = 512  # of elements that a program turns, of plain queries


@triton.jit
def _normed(x, mask, weight, at, eps, LEN: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 0) / LEN + eps) * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def append_row(
    source, stride, row, slot, latent_norm, cos, sin, pages, turned, scales, page_stride, turned_stride, scale_stride,
    token_len, turned_len, eps,
    SUMMANDS: tl.constexpr, Q_LEN: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, T: tl.constexpr,
    T_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, IN_8_BITS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Write one row's normalised latent and turned key to its slot, if it has one."""
    c, t = tl.arange(0, C_PAD), tl.arange(0, T_PAD)
    x = load_sum(source, stride, Q_LEN + c, c < C, SUMMANDS, dtype).to(tl.float32)
    other, angle, sign = turns_with(t, T // 2, INTERLEAVED)
    own = load_sum(source, stride, Q_LEN + C + t, t < T, SUMMANDS, dtype).to(tl.float32)
    partner = load_sum(source, stride, Q_LEN + C + other, t < T, SUMMANDS, dtype).to(tl.float32)
    cosine = tl.load(cos + row * (T // 2) + angle, mask=t < T, other=1.0)
    sine = tl.load(sin + row * (T // 2) + angle, mask=t < T, other=0.0)
    page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    latent = _normed(x, c < C, latent_norm, c, eps, C).to(dtype)
    if IN_8_BITS:
        exact = latent.to(tl.float32)
        scale = scale_of(exact, 0)
        tl.store(scales + page * scale_stride + offset, scale, mask=slot >= 0)
        latent = as_byte(tl.clamp(tl.div_rn(exact, scale + tl.zeros_like(exact)), -448.0, 448.0))
    tl.store(pages + page * page_stride + offset * token_len + c, latent, mask=(c < C) & (slot >= 0))
    key = (own * cosine + sign * partner * sine).to(dtype).to(turned.dtype.element_ty)
    tl.store(turned + page * turned_stride + offset * turned_len + t, key, mask=(t < T) & (slot >= 0))


@triton.jit
def _append_kernel(
    flat, first, latent_norm, q_norm, cos, sin, pages, turned, scales, slots, num_rows, page_stride, turned_stride,
    scale_stride, token_len, turned_len, eps,
    SUMMANDS: tl.constexpr, Q_LEN: tl.constexpr, Q_PAD: tl.constexpr, NORM_Q: tl.constexpr,
    C: tl.constexpr, C_PAD: tl.constexpr, T: tl.constexpr, T_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr, IN_8_BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype: tl.constexpr = first.dtype.element_ty
    columns: tl.constexpr = Q_LEN + C + T
    slot = tl.load(slots + row)  # uploaded before the step's first kernel
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source, stride = flat + row * columns, num_rows * columns
    if part == 0:
        append_row(
            source, stride, row, slot, latent_norm, cos, sin, pages, turned, scales, page_stride, turned_stride,
            scale_stride, token_len, turned_len, eps,
            SUMMANDS, Q_LEN, C, C_PAD, T, T_PAD, BLOCK_SIZE, INTERLEAVED, IN_8_BITS, dtype,
        )  # fmt: skip
    else:
        q = (part - 1) * Q_PAD + tl.arange(0, Q_PAD)
        y = load_sum(source, stride, q, q < Q_LEN, SUMMANDS, dtype).to(tl.float32)
        if NORM_Q:
            y = _normed(y, q < Q_LEN, q_norm, q, eps, Q_LEN)
        tl.store(first + row * Q_LEN + q, y.to(dtype), mask=q < Q_LEN)


@triton.jit
def _queries_kernel(
    first, absorbed, cos, sin, out, num_rows, num_heads,
    P: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, T: tl.constexpr, T_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    c, t = tl.arange(0, C_PAD), tl.arange(0, T_PAD)
    to = out + (row * num_heads + head) * (C + T)
    tl.store(to + c, tl.load(absorbed + (head * num_rows + row) * C + c, mask=c < C, other=0.0), mask=c < C)
    other, angle, sign = turns_with(t, T // 2, INTERLEAVED)
    source = first + (row * num_heads + head) * (P + T) + P
    own = tl.load(source + t, mask=t < T, other=0.0).to(tl.float32)
    partner = tl.load(source + other, mask=t < T, other=0.0).to(tl.float32)
    cosine = tl.load(cos + row * (T // 2) + angle, mask=t < T, other=1.0)
    sine = tl.load(sin + row * (T // 2) + angle, mask=t < T, other=0.0)
    tl.store(to + C + t, (own * cosine + sign * partner * sine).to(out.dtype.element_ty), mask=t < T)


@triton.jit
def _turn_kernel(
    first, cos, sin, num_heads, P: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A thread turns both elements of a pair, so that nobody else reads what it overwrites."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    head, angle = pair // HALF, pair % HALF
    here = head < num_heads
    at = first + (row * num_heads + head) * (P + 2 * HALF) + P
    if INTERLEAVED:
        one, other = at + 2 * angle, at + 2 * angle + 1
    else:
        one, other = at + angle, at + angle + HALF
    a, b = tl.load(one, mask=here, other=0.0).to(tl.float32), tl.load(other, mask=here, other=0.0).to(tl.float32)
    cosine, sine = tl.load(cos + row * HALF + angle), tl.load(sin + row * HALF + angle)
    tl.store(one, (a * cosine - b * sine).to(first.dtype.element_ty), mask=here)
    tl.store(other, (b * cosine + a * sine).to(first.dtype.element_ty), mask=here)


def turn_queries(
    first: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, pdl: bool = False
) -> None:
    """Turn the last elements of plain queries, in place.

    Args:
        first: [R, Q, P + T], packed: of each head what is not turned, then what is.
        cos, sin: [R, T / 2] float32, packed.
        interleaved: see ``attention.append.rotate``.
        pdl: launch programmatically dependent.
    """
    (rows, num_heads, width), half = first.shape, cos.shape[-1]
    if rows and num_heads:
        _turn_kernel[(rows, -(-num_heads * half // TURNED_PAIRS))](
            first, cos, sin, num_heads, P=width - 2 * half, HALF=half, PAIRS=TURNED_PAIRS, INTERLEAVED=interleaved,
            num_warps=4, **early(pdl),
        )  # fmt: skip


def latent_append(
    flat: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: Pages,
    slot: torch.Tensor,
    *,
    latent_norm: torch.Tensor,
    q_norm: torch.Tensor | None,
    eps: float,
    interleaved: bool,
    pdl: bool = False,
) -> torch.Tensor:
    """Write the normalised latents and turned keys of owned rows into their pages; return what queries are made of.

    Args:
        flat: [S, R, F + C + T], packed, as the projection leaves it: the sum over S, in the pages' dtype.
        cos, sin: [R, T / 2] float32, packed.
        pages: [P, 1, 1, block_size, C + T], one layer's pages.
        slot: [R] int64, page * block_size + offset, or -1.
        latent_norm: [C], the weight of the latents' norm.
        q_norm: [F], of the norm of the queries' latents; None where the first F elements are the queries themselves.
        eps: of both norms.
        interleaved: see ``attention.append.rotate``.
        pdl: launch programmatically dependent.

    Returns:
        [R, F], normalised where there is a norm.
    """
    (summands, rows, columns), (block_size, width) = flat.shape, pages.shape[3:]
    rank, q_len = latent_norm.shape[0], columns - width
    first = torch.empty((rows, q_len), dtype=pages.dtype, device=flat.device)
    if rows:
        values, scales, in_8_bits = planes_of(pages)
        turned = pages.turned if isinstance(pages, QuantizedPages) else pages[..., rank:]
        assert turned is not None
        q_pad = triton.next_power_of_2(q_len) if q_norm is not None else 1024
        _append_kernel[(rows, 1 + -(-q_len // q_pad))](
            flat, first, latent_norm, latent_norm if q_norm is None else q_norm, cos, sin, values, turned, scales,
            slot, rows, values.stride(0), turned.stride(0), scales.stride(0), values.stride(3), turned.stride(3), eps,
            SUMMANDS=summands, Q_LEN=q_len, Q_PAD=q_pad, NORM_Q=q_norm is not None,
            C=rank, C_PAD=triton.next_power_of_2(rank), T=width - rank, T_PAD=triton.next_power_of_2(width - rank),
            BLOCK_SIZE=block_size, INTERLEAVED=interleaved, IN_8_BITS=in_8_bits, num_warps=4, **early(pdl),
        )  # fmt: skip
    return first


def latent_queries(
    first: torch.Tensor,
    absorbed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool,
    pdl: bool = False,
) -> torch.Tensor:
    """Return queries in the latent space, [R, Q, C + T]: what keys' projections made of them, then their turned part.

    Args:
        first: [R, Q, P + T], packed: of each head what is not turned, then what is, before RoPE.
        absorbed: [Q, R, C], packed.
        cos, sin: [R, T / 2] float32, packed.
        interleaved: see ``attention.append.rotate``.
        pdl: launch programmatically dependent.
    """
    num_heads, rows, rank = absorbed.shape
    turned = 2 * cos.shape[-1]
    out = first.new_empty((rows, num_heads, rank + turned))
    if rows and num_heads:
        _queries_kernel[(rows, num_heads)](
            first, absorbed, cos, sin, out, rows, num_heads,
            P=first.shape[-1] - turned, C=rank, C_PAD=triton.next_power_of_2(rank),
            T=turned, T_PAD=triton.next_power_of_2(turned), INTERLEAVED=interleaved, num_warps=1, **early(pdl),
        )  # fmt: skip
    return out
