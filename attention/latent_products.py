"""Into the latent space and out of it, for few rows: head by head products that stream their weights, in a launch each.

A program takes some columns of one head, so that its weights are asked for before it waits for the kernel that makes
the rows (programmatic dependent launch). Many rows are for the library (``helix.models.latent``).

Shape letters: R rows, Q heads; P plain and T turned elements of a query, C elements of a latent, W of a value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from parallel.device import early

from .append import load_sum, turns_with
from .latent_append import append_row
from .pages import Pages, QuantizedPages, planes_of

MAX_ROWS = 64
ROWS = tl.constexpr(16)  # of a program: the least of a product on tensor cores
LATENT_COLUMNS, VALUE_COLUMNS = 64, 16  # of a program


@triton.jit(do_not_specialize=["num_rows"])
def _queries_kernel(
    source, k_up, cos, sin, out, latent_norm, pages, turned, scales, slots, num_rows, page_stride, turned_stride,
    scale_stride, token_len, turned_len, eps,
    SUMMANDS: tl.constexpr, APPEND: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr,
    C: tl.constexpr, C_PAD: tl.constexpr, T: tl.constexpr, T_PAD: tl.constexpr, BN: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, IN_8_BITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of what one head's queries are in the latent space; its next program turns the rest of them, and the
    one after that appends some of the rows.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head, part = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = out.dtype.element_ty
    columns: tl.constexpr = HEADS * (P + T) + ((C + T) if APPEND else 0)
    stride = num_rows * columns
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    here = (r < num_rows)[:, None]
    at = r.to(tl.int64)[:, None] * columns + head * (P + T)
    to = out + (r.to(tl.int64) * HEADS + head)[:, None] * (C + T)
    if part * BN < C:
        p, c = tl.arange(0, P_PAD), part * BN + tl.arange(0, BN)
        from_w = k_up + (head * P + p).to(tl.int64)[:, None] * C + c[None, :]
        w = tl.load(from_w, mask=(p < P)[:, None] & (c < C)[None, :], other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        x = load_sum(source, stride, at + p[None, :], here & (p < P)[None, :], SUMMANDS, dtype)
        absorbed = tl.dot(x, w, input_precision="ieee")
        tl.store(to + c[None, :], absorbed.to(dtype), mask=here & (c < C)[None, :])
    elif (part - 1) * BN < C:
        t = tl.arange(0, T_PAD)
        there = here & (t < T)[None, :]
        other, angle, sign = turns_with(t, T // 2, INTERLEAVED)
        if PDL:
            tl.extra.cuda.gdc_wait()
        own = load_sum(source, stride, at + P + t[None, :], there, SUMMANDS, dtype).to(tl.float32)
        partner = load_sum(source, stride, at + P + other[None, :], there, SUMMANDS, dtype).to(tl.float32)
        cosine = tl.load(cos + r[:, None] * (T // 2) + angle[None, :], mask=there, other=1.0)
        sine = tl.load(sin + r[:, None] * (T // 2) + angle[None, :], mask=there, other=0.0)
        value = own * cosine + sign[None, :] * partner * sine
        tl.store(to + C + t[None, :], value.to(dtype), mask=there)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
        if APPEND:
            first = tl.program_id(2) * ROWS
            for row in range(first + head, min(first + ROWS, num_rows), HEADS):
                slot = tl.load(slots + row)
                append_row(
                    source + row * columns, stride, row, slot, latent_norm, cos, sin, pages, turned, scales,
                    page_stride, turned_stride, scale_stride, token_len, turned_len, eps,
                    SUMMANDS, HEADS * (P + T), C, C_PAD, T, T_PAD, BLOCK_SIZE, INTERLEAVED, IN_8_BITS, dtype,
                )  # fmt: skip


@triton.jit
def _values_kernel(
    merged, v_up, out, num_rows, num_heads,
    C: tl.constexpr, C_PAD: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some elements of the values of one head."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C_PAD)
    inside, here = (c < C)[None, :], (r < num_rows)[:, None]
    w = tl.load(v_up + (head * W + n).to(tl.int64)[:, None] * C + c[None, :], mask=(n < W)[:, None] & inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = (r.to(tl.int64) * num_heads + head)[:, None]
    x = tl.load(merged + row * C + c[None, :], mask=here & inside, other=0.0)
    value = tl.dot(x, tl.trans(w), input_precision="ieee")
    tl.store(out + row * W + n[None, :], value.to(out.dtype.element_ty), mask=here & (n < W)[None, :])


def latent_queries_of(
    parts: torch.Tensor,
    k_up: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool,
    pdl: bool = False,
) -> torch.Tensor:
    """Return queries in the latent space, [R, Q, C + T]: what keys' projections make of them, then their turned part.

    Args:
        parts: [S, R, Q (P + T)], packed, R at most MAX_ROWS, and the sum over S in k_up's dtype: of each head what is
            not turned, then what is, before RoPE.
        k_up: [Q, P, C], packed.
        cos, sin: [R, T / 2] float32, packed.
        interleaved: see ``attention.append.rotate``.
        pdl: launch programmatically dependent.
    """
    return _queries(parts, k_up, cos, sin, interleaved=interleaved, pdl=pdl)


def latent_append_and_queries(
    flat: torch.Tensor,
    k_up: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: Pages,
    slot: torch.Tensor,
    *,
    latent_norm: torch.Tensor,
    eps: float,
    interleaved: bool,
    pdl: bool = False,
) -> torch.Tensor:
    """Do what ``latent_append`` and ``latent_queries_of`` do where queries have no latent, in one launch.

    Args:
        flat: [S, R, Q (P + T) + C + T], packed, as the projection leaves it: the sum over S, in the pages' dtype.
        k_up: [Q, P, C], packed.
        cos, sin, pages, slot, latent_norm, eps, interleaved, pdl: as those two take them.
    """
    values, scales, in_8_bits = planes_of(pages)
    turned = pages.turned if isinstance(pages, QuantizedPages) else pages[..., latent_norm.shape[0] :]
    assert turned is not None
    strides = values.stride(0), turned.stride(0), scales.stride(0), values.stride(3), turned.stride(3)
    where = (latent_norm, values, turned, scales, slot), (*strides, eps), pages.shape[3], in_8_bits
    return _queries(flat, k_up, cos, sin, where, interleaved=interleaved, pdl=pdl)


def _queries(
    source: torch.Tensor,
    k_up: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    where: tuple[tuple[Any, ...], tuple[Any, ...], int, bool] = ((None,) * 5, (0, 0, 0, 0, 0, 0.0), 1, False),
    *,
    interleaved: bool,
    pdl: bool,
) -> torch.Tensor:
    """Launch the kernel; ``where`` says where latents go: tensors, numbers, tokens a page, and whether in 8 bits."""
    (summands, rows, _), (num_heads, plain, rank), turned = source.shape, k_up.shape, 2 * cos.shape[-1]
    out = k_up.new_empty((rows, num_heads, rank + turned))
    tensors, numbers, block_size, in_8_bits = where
    appends = tensors[0] is not None
    if rows and num_heads:
        _queries_kernel[(num_heads, -(-rank // LATENT_COLUMNS) + 1 + appends, -(-rows // ROWS.value))](
            source, k_up, cos, sin, out, *tensors, rows, *numbers,
            SUMMANDS=summands, APPEND=appends, P=plain, P_PAD=_padded(plain),
            C=rank, C_PAD=triton.next_power_of_2(rank), T=turned, T_PAD=triton.next_power_of_2(turned),
            BN=LATENT_COLUMNS, HEADS=num_heads, BLOCK_SIZE=block_size, INTERLEAVED=interleaved, IN_8_BITS=in_8_bits,
            num_warps=4, **early(pdl),
        )  # fmt: skip
    return out


def latent_values(merged: torch.Tensor, v_up: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Return the values [R, Q, W] of what attention returned in the latent space.

    Args:
        merged: [R, Q, C], packed, R at most MAX_ROWS.
        v_up: [Q, W, C], packed, in merged's dtype.
        pdl: launch programmatically dependent.
    """
    (rows, num_heads, rank), width = merged.shape, v_up.shape[1]
    out = merged.new_empty((rows, num_heads, width))
    if rows and num_heads:
        _values_kernel[(num_heads, -(-width // VALUE_COLUMNS), -(-rows // ROWS.value))](
            merged, v_up, out, rows, num_heads, C=rank, C_PAD=_padded(rank), W=width, BN=VALUE_COLUMNS,
            num_warps=4, **early(pdl),
        )  # fmt: skip
    return out


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
