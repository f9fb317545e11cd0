"""The log-sum-exp merge of partial attention results: the oracle and the Triton kernel.

Partials over disjoint key sets combine exactly: with weights exp(lse_n - max), out = sum(w_n out_n) / sum(w_n). A
partial that saw no token has lse = -inf and weight zero, whatever its values; where no partial saw one the result is
zero and its lse -inf (arXiv 2507.07120, section 2.1; arXiv 1805.02867 for the online softmax).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def merge_reference(out_NRQD: torch.Tensor, lse_NRQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge N partials in float32 (float64 stays float64), on any device.

    Args:
        out_NRQD: [N, R, Q, D], each partial normalised over its own keys; values under lse = -inf are ignored.
        lse_NRQ: [N, R, Q] float32 or float64, natural log.

    Returns:
        The merged [R, Q, D] in out's dtype and its lse [R, Q] in lse's dtype.
    """
    lse = lse_NRQ if lse_NRQ.dtype == torch.float64 else lse_NRQ.float()
    top_RQ = lse.amax(0)
    empty = torch.isneginf(top_RQ)
    weight = torch.exp(lse - top_RQ.masked_fill(empty, 0.0))
    total_RQ = weight.sum(0)
    out = out_NRQD.to(lse.dtype).masked_fill(torch.isneginf(lse).unsqueeze(-1), 0.0)
    merged = (weight.unsqueeze(-1) * out).sum(0) / total_RQ.masked_fill(empty, 1.0).unsqueeze(-1)
    return merged.to(out_NRQD.dtype), top_RQ + torch.log(total_RQ)


@triton.jit
def _merge_packed_kernel(
    packed, out, heads, N: tl.constexpr, H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, W: tl.constexpr
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(0)
    d = tl.arange(0, D_PAD)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for n in tl.static_range(N):
        cell = (n * rows + row) * H_PAD + head
        base = packed + cell * (D + W)
        lse = tl.load(packed.to(tl.pointer_type(tl.float32)) + cell * ((D + W) // W) + D // W)
        o = tl.load(base + d, mask=d < D, other=0.0).to(tl.float32)
        o = tl.where(lse == float("-inf"), 0.0, o)  # values of an empty partial may be NaN
        new_top = tl.maximum(top, lse)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        old, new = tl.exp(top - shift), tl.exp(lse - shift)
        acc = acc * old + o * new
        total = total * old + new
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (row * heads + head) * D + d, acc.to(out.dtype.element_ty), mask=d < D)


def lse_words(dtype: torch.dtype) -> int:
    """Return how many elements of ``dtype`` one float32 log-sum-exp fills in a packed message."""
    return 4 // dtype.itemsize


def merge_packed(packed_NRQW: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """Merge a received packed message with one Triton launch.

    Args:
        packed_NRQW: contiguous [N, R, Q_padded, D + W], float32, float16 or bfloat16; the last W = lse_words(dtype)
            elements of a row are the bits of its float32 lse.
        heads: how many of the padded heads are real.
        head_dim: D.

    Returns:
        [R, heads, D] in the message's dtype.
    """
    n, rows, padded, _ = packed_NRQW.shape
    out = packed_NRQW.new_empty((rows, heads, head_dim))
    if rows and heads:
        _merge_packed_kernel[(rows, heads)](
            packed_NRQW,
            out,
            heads,
            N=n,
            H_PAD=padded,
            D=head_dim,
            D_PAD=triton.next_power_of_2(head_dim),
            W=lse_words(packed_NRQW.dtype),
            num_warps=1,
        )
    return out


@triton.jit
def _merge_splits_kernel(
    part, part_lse, out, lse, num_rows, num_heads, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    TURN: tl.constexpr = min(SPLITS_PAD, max(1, 8192 // D_PAD))
    all_s = tl.arange(0, SPLITS_PAD)
    each = tl.load(part_lse + (all_s * num_rows + row) * num_heads + head, mask=all_s < SPLITS, other=float("-inf"))
    top = tl.max(each, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(each - shift), 0)
    d = tl.program_id(2) * D_PAD + tl.arange(0, D_PAD)
    acc = tl.zeros([TURN, D_PAD], tl.float32)
    for first in tl.static_range(0, SPLITS_PAD, TURN):
        s = first + tl.arange(0, TURN)
        cell = (s * num_rows + row) * num_heads + head
        # no load waits for another: what an empty split left in memory is read, and dropped by its weight
        o = tl.load(part + cell[:, None] * D + d[None, :], mask=(s < SPLITS)[:, None] & (d < D)[None, :], other=0.0)
        weight = tl.exp(tl.load(part_lse + cell, mask=s < SPLITS, other=float("-inf")) - shift)[:, None]
        acc += tl.where(weight > 0.0, o, 0.0) * weight
    merged = tl.sum(acc, 0) / tl.where(total == 0.0, 1.0, total)
    here = row * num_heads + head
    tl.store(out + here * D + d, merged.to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + here, tl.where(total == 0.0, float("-inf"), shift + tl.log(tl.where(total == 0.0, 1.0, total))))


def merge_splits(
    part_SRQD: torch.Tensor, lse_SRQ: torch.Tensor, dtype: torch.dtype, *, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the splits of one rank's shard: [R, Q, D] in ``dtype`` and lse [R, Q]; one split is returned as it is.

    Args:
        part_SRQD: [S, R, Q, D] packed; float32 where S > 1. Values under lse = -inf are dropped.
        lse_SRQ: [S, R, Q] float32, natural log.
        dtype: of the result.
        pdl: launch programmatically dependent.
    """
    splits, rows, heads, head_dim = part_SRQD.shape
    if splits == 1:
        return part_SRQD[0].to(dtype), lse_SRQ[0]
    if not (part_SRQD.is_cuda or triton.knobs.runtime.interpret):
        out, lse = merge_reference(part_SRQD, lse_SRQ)
        return out.to(dtype), lse
    out, lse = part_SRQD.new_empty((rows, heads, head_dim), dtype=dtype), torch.empty_like(lse_SRQ[0])
    if rows:
        columns = min(32, triton.next_power_of_2(head_dim)) if rows * heads < 256 else triton.next_power_of_2(head_dim)
        _merge_splits_kernel[(rows, heads, -(-head_dim // columns))](
            part_SRQD, lse_SRQ, out, lse, rows, heads, D=head_dim, D_PAD=columns,
            SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits), PDL=pdl,
            num_warps=4, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return out, lse
