"""QK norm, RoPE, and the write of K and V into the slots that this rank owns: step by step, or in one kernel.

Every rank rotates with global positions; only the owner of a position stores its K and V. The new token is appended
first and read by the same step's attention, so nothing is merged twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from parallel.device import early

from .eight_bits import as_byte, scale_of
from .pages import Pages, QuantizedPages, planes_of

MANY_ROWS, ROWS = 512, 16
"""From so many rows on a program takes several: starting programs would cost more than they do."""


def rotate(x_RHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Apply rotary position embedding to the first dims of every head, in float32.

    Args:
        x_RHD: [R, heads, D].
        cos, sin: [R, rotary_dim / 2] float32, scaled; rotary_dim <= D, the other dims pass through.
        interleaved: pairs are (0, 1), (2, 3), ... as in GLM, instead of halves as in Llama.

    Returns:
        A new [R, heads, D] in x's dtype.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turning = x_RHD[..., : 2 * half].float()
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., :half], turning[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    mixed = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((mixed.to(x_RHD.dtype), x_RHD[..., 2 * half :]), -1)


@triton.jit
def write_head(x, real, pages, scales, fixed, page, kv, head, offset, heads, page_stride, scale_stride,
               BLOCK_SIZE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, IN_8_BITS: tl.constexpr,
               FIXED: tl.constexpr):  # fmt: skip
    """Write tokens' keys or values [BR, D_PAD], where ``real``, to offsets of pages; page and offset are [BR, 1]."""
    d = tl.arange(0, D_PAD)[None, :]
    token = ((kv * heads + head) * BLOCK_SIZE + offset).to(tl.int64)
    if IN_8_BITS:
        exact = x.to(tl.float32)
        scale = scale_of(exact, 1)[:, None]
        if FIXED:
            scale = tl.load(fixed + kv) + tl.zeros_like(scale)
        tl.store(scales + page * scale_stride + token, scale, mask=tl.max(real.to(tl.int32), 1)[:, None] > 0)
        x = as_byte(tl.clamp(tl.div_rn(exact, scale + tl.zeros_like(exact)), -448.0, 448.0))
    tl.store(pages + page * page_stride + token * D + d, x, mask=real)


@triton.jit
def _append_kernel(k, v, k_row_stride, v_row_stride, pages, scales, fixed, slots, page_stride, scale_stride,
                   BLOCK_SIZE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_V: tl.constexpr,
                   IN_8_BITS: tl.constexpr, FIXED: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        d = tl.arange(0, D_PAD)[None, :]
        its_slot = slot + tl.zeros([1, 1], tl.int64)
        page, offset = its_slot // BLOCK_SIZE, its_slot % BLOCK_SIZE
        x = tl.load(k + row * k_row_stride + head * D + d, mask=d < D, other=0.0)
        write_head(x, d < D, pages, scales, fixed, page, 0, head, offset, tl.num_programs(1), page_stride,
                   scale_stride, BLOCK_SIZE, D, D_PAD, IN_8_BITS, FIXED)  # fmt: skip
        if HAS_V:
            x = tl.load(v + row * v_row_stride + head * D + d, mask=d < D, other=0.0)
            write_head(x, d < D, pages, scales, fixed, page, 1, head, offset, tl.num_programs(1), page_stride,
                       scale_stride, BLOCK_SIZE, D, D_PAD, IN_8_BITS, FIXED)  # fmt: skip


def append(
    k_RKD: torch.Tensor,
    v_RKD: torch.Tensor | None,
    pages: Pages,
    slot: torch.Tensor,
    fixed: torch.Tensor | None = None,
) -> None:
    """Write K and V of the rows that this rank owns into its pages; rows with slot -1 are skipped.

    Args:
        k_RKD, v_RKD: [R, K, D], heads packed; rows may be strided. v_RKD is None where K is all that is cached.
        pages: [P, 2, K, block_size, D], one layer's pages, K before V; or [P, 1, K, block_size, D]. In 8 bits what is
            written is quantised.
        slot: [R] int64, page * block_size + offset, or -1. No slot occurs twice.
        fixed: [2] float32, in 8 bits the scales of all keys and of all values; None makes one a token and KV head.
    """
    block_size = pages.shape[3]
    if not k_RKD.is_cuda:
        mine = slot >= 0
        page, offset = slot[mine] // block_size, slot[mine] % block_size
        for part, x in enumerate((k_RKD,) if v_RKD is None else (k_RKD, v_RKD)):
            if isinstance(pages, QuantizedPages):
                pages.write(part, x[mine], page, offset, fixed)
            else:
                pages[page, part, :, offset] = x[mine]
        return
    append_kernel(k_RKD, v_RKD, pages, slot, fixed)


def append_kernel(
    k_RKD: torch.Tensor,
    v_RKD: torch.Tensor | None,
    pages: Pages,
    slot: torch.Tensor,
    fixed: torch.Tensor | None = None,
) -> None:
    """Do what ``append`` does with one Triton launch of static shape, so that a CUDA graph can hold it."""
    rows, heads, head_dim = k_RKD.shape
    if rows == 0:
        return
    v = k_RKD if v_RKD is None else v_RKD
    values, scales, in_8_bits = planes_of(pages)
    _append_kernel[(rows, heads)](
        k_RKD, v, k_RKD.stride(0), v.stride(0), values, scales, scales if fixed is None else fixed, slot,
        values.stride(0), scales.stride(0),
        BLOCK_SIZE=pages.shape[3], D=head_dim, D_PAD=triton.next_power_of_2(head_dim), HAS_V=v_RKD is not None,
        IN_8_BITS=in_8_bits, FIXED=fixed is not None, num_warps=1,
    )  # fmt: skip


@triton.jit
def turns_with(d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return which element RoPE turns with element d, which angle turns both, and the sign of the other's sine."""
    if INTERLEAVED:
        return d ^ 1, d // 2, tl.where(d % 2 == 0, -1.0, 1.0)
    else:
        first = d < HALF
        return tl.where(first, d + HALF, d - HALF), tl.where(first, d, d - HALF), tl.where(first, -1.0, 1.0)


@triton.jit
def _swapped(x, INTERLEAVED: tl.constexpr):
    """Return [BR, D] with the elements of each pair that RoPE turns in each other's place: D is what it turns."""
    if INTERLEAVED:
        pairs = tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])
        first, second = tl.split(pairs)
        return tl.reshape(tl.join(second, first), x.shape)
    else:
        pairs = tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1))
        first, second = tl.split(pairs)
        return tl.reshape(tl.permute(tl.join(second, first), (0, 2, 1)), x.shape)


@triton.jit
def _of_pairs(x, INTERLEAVED: tl.constexpr):
    """Return [BR, D] of what each pair of elements has, [BR, D / 2]."""
    both = tl.join(x, x)
    if not INTERLEAVED:
        both = tl.permute(both, (0, 2, 1))
    return tl.reshape(both, [x.shape[0], 2 * x.shape[1]])


@triton.jit
def load_sum(source, stride, at, mask, SUMMANDS: tl.constexpr, DTYPE: tl.constexpr):
    """Load values, or the sums of SUMMANDS of them that stand ``stride`` apart, as DTYPE."""
    total = tl.load(source + at, mask=mask, other=0.0)
    for s in tl.static_range(1, SUMMANDS):
        total += tl.load(source + s * stride + at, mask=mask, other=0.0)
    return total.to(DTYPE)


@triton.jit(do_not_specialize=["num_rows"])
def _rope_append_kernel(
    qkv, q, q_norm, k_norm, cos, sin, pages, scales, fixed, slots, num_rows, page_stride, scale_stride, eps,
    SUMMANDS: tl.constexpr, NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BR: tl.constexpr,
    IN_8_BITS: tl.constexpr, FIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of BR rows."""
    head = tl.program_id(1)
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    there = (row < num_rows)[:, None]
    is_q, is_v = head < NUM_Q, head >= NUM_Q + NUM_KV
    d = tl.arange(0, D_PAD)[None, :]
    real, turns = d < D, d < 2 * HALF
    other, angle, sign = turns_with(d, HALF, INTERLEAVED)
    if NORM:
        weight = q_norm if is_q else k_norm
        own_weight = tl.load(weight + d, mask=real, other=0.0).to(tl.float32)
        other_weight = tl.load(weight + other, mask=turns, other=0.0).to(tl.float32)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)[:, None]  # uploaded before the step's first kernel
    row = row[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # everything is asked for at once, whether this program needs it or not
    columns: tl.constexpr = (NUM_Q + 2 * NUM_KV) * D
    at = row * columns + head * D
    x = load_sum(qkv, num_rows * columns, at + d, there & real, SUMMANDS, q.dtype.element_ty)
    value = x.to(tl.float32)
    if BR > 1 and (INTERLEAVED or 2 * HALF == D_PAD):  # neighbours in memory stay neighbours, so that loads are wide
        partner = _swapped(value, INTERLEAVED)
        pair = tl.arange(0, D_PAD // 2)[None, :]
        c = _of_pairs(tl.load(cos + row * HALF + pair, mask=there & (pair < HALF), other=1.0), INTERLEAVED)
        s = _of_pairs(tl.load(sin + row * HALF + pair, mask=there & (pair < HALF), other=0.0), INTERLEAVED)
    else:
        partner = load_sum(qkv, num_rows * columns, at + other, there & turns, SUMMANDS, q.dtype.element_ty)
        partner = partner.to(tl.float32)
        c = tl.load(cos + row * HALF + angle, mask=there & turns, other=1.0)
        s = tl.load(sin + row * HALF + angle, mask=there & turns, other=0.0)
    if NORM:
        scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        value *= scale * own_weight
        partner *= scale * other_weight
    turned = (value * c + sign * partner * s).to(q.dtype.element_ty)
    if is_q:
        tl.store(q + (row * NUM_Q + head) * D + d, turned, mask=there & real)
    else:
        kv_head = tl.where(is_v, head - NUM_Q - NUM_KV, head - NUM_Q)
        write_head(
            tl.where(is_v, x, turned), real & (slot >= 0), pages, scales, fixed, slot // BLOCK_SIZE, is_v.to(tl.int32),
            kv_head, slot % BLOCK_SIZE, NUM_KV, page_stride, scale_stride, BLOCK_SIZE, D, D_PAD, IN_8_BITS, FIXED,
        )  # fmt: skip


def rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: Pages,
    slot: torch.Tensor,
    *,
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    interleaved: bool,
    fixed: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Normalise and rotate Q and K, write K and V of owned rows into their pages, and return Q, in one Triton launch.

    Args:
        qkv: [S, R, (Q + 2 K) D], packed, as the fused projection leaves it: the sum over S, in the pages' dtype.
        cos, sin: [R, rotary_dim / 2] float32, packed.
        pages: [P, 2, K, block_size, D], one layer's pages.
        slot: [R] int64, page * block_size + offset, or -1.
        num_heads: Q.
        norms: the weights [D] of Q's and K's norm and their eps; None without QK norm.
        interleaved: see ``rotate``.
        fixed: as for ``append``.
        pdl: launch programmatically dependent.

    Returns:
        q [R, Q, D], packed.
    """
    (summands, rows), (num_kv_heads, block_size, head_dim) = qkv.shape[:2], pages.shape[2:]
    q = torch.empty((rows, num_heads, head_dim), dtype=pages.dtype, device=qkv.device)
    if rows:
        q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
        few = rows < MANY_ROWS
        values, scales, in_8_bits = planes_of(pages)
        _rope_append_kernel[(-(-rows // (1 if few else ROWS)), num_heads + 2 * num_kv_heads)](
            qkv, q, q_norm, k_norm, cos, sin, values, scales, scales if fixed is None else fixed, slot,
            rows, values.stride(0), scales.stride(0), eps,
            SUMMANDS=summands, NUM_Q=num_heads, NUM_KV=num_kv_heads, D=head_dim,
            D_PAD=triton.next_power_of_2(head_dim),
            HALF=cos.shape[-1], BLOCK_SIZE=block_size, INTERLEAVED=interleaved, NORM=norms is not None,
            BR=1 if few else ROWS, IN_8_BITS=in_8_bits, FIXED=fixed is not None, num_warps=1 if few else 4,
            **early(pdl),
        )  # fmt: skip
    return q
