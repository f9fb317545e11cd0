"""The log-sum-exp merge of partial attention results: the oracle and the Triton kernel.

Partials over disjoint key sets combine exactly: with weights exp(lse_n - max), out = sum(w_n out_n) / sum(w_n). A
partial that saw no token has lse = -inf and weight zero, whatever its values; where no partial saw one the result is
zero and its lse -inf (arXiv 2507.07120, section 2.1; arXiv 1805.02867 for the online softmax).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from parallel.device import early

from .partial import Partials

FEW_HEADS = 256  # rows x heads up to which a launch cannot fill a GPU, so that all that counts is how long one takes
CELLS = 16  # heads of rows of a program that merges one partial more


def parts_at_once(rows_x_heads: int) -> int:
    """Return how many parts of a head are read at once: all where there are few heads, whose rows are cut finely."""
    if rows_x_heads <= 64:
        return 256
    return 64 if rows_x_heads < FEW_HEADS else 16


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


def join_sinks(out_RQD: torch.Tensor, lse_RQ: torch.Tensor, sinks_Q: torch.Tensor) -> torch.Tensor:
    """Let each head's sink join what its rows make of all their tokens: a score that has no value.

    It joins once, where a row's log-sum-exp is that of all its tokens. A row that saw nothing stays zero.

    Args:
        out_RQD: merged, normalised over the tokens alone.
        lse_RQ: float32 or float64, natural log.
        sinks_Q: float32, scores as they are.
    """
    if out_RQD.is_cuda and lse_RQ.dtype == torch.float32:
        return join_sinks_kernel(out_RQD, lse_RQ, sinks_Q)
    kept = torch.sigmoid(lse_RQ - sinks_Q).unsqueeze(-1)
    joined = out_RQD.to(lse_RQ.dtype) * kept
    return joined.masked_fill(kept == 0, 0.0).to(out_RQD.dtype)


@triton.jit(do_not_specialize=["num_cells"])
def _join_sinks_kernel(
    out, lse, sinks, joined, num_cells, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, CELLS: tl.constexpr
):  # fmt: skip
    """CELLS heads of rows, each with its head's sink."""
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    d = tl.arange(0, D_PAD)
    here = cell < num_cells
    at, inside = cell[:, None] * D + d[None, :], here[:, None] & (d < D)[None, :]
    score = tl.load(lse + cell, mask=here, other=float("-inf")) - tl.load(sinks + cell % HEADS, mask=here, other=0.0)
    small = tl.exp(-tl.abs(score))
    kept = (tl.where(score < 0.0, small, 1.0) / (1.0 + small))[:, None]
    value = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(kept > 0.0, value * kept, 0.0)  # of a row that saw nothing it may be NaN
    tl.store(joined + at, value.to(joined.dtype.element_ty), mask=inside)


def join_sinks_kernel(out_RQD: torch.Tensor, lse_RQ: torch.Tensor, sinks_Q: torch.Tensor) -> torch.Tensor:
    """Do what ``join_sinks`` does in one launch; lse in float32."""
    out, lse = out_RQD.contiguous(), lse_RQ.contiguous()
    (_, heads, head_dim), num_cells = out.shape, lse.numel()
    joined = torch.empty_like(out)
    if num_cells:
        _join_sinks_kernel[(-(-num_cells // CELLS),)](
            out, lse, sinks_Q, joined, num_cells, HEADS=heads, D=head_dim, D_PAD=triton.next_power_of_2(head_dim),
            CELLS=CELLS, num_warps=4,
        )  # fmt: skip
    return joined


@triton.jit
def _merge_parts_kernel(
    part, part_lse, part_start, sinks, out, lse, num_heads, D: tl.constexpr, D_PAD: tl.constexpr, TURN: tl.constexpr,
    SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of a row, TURN parts at a time, values and lse asked for at once; sums shrink as the top grows."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # the step's work was uploaded before its first layer
    start, stop = tl.load(part_start + row), tl.load(part_start + row + 1)
    d = tl.program_id(2) * D_PAD + tl.arange(0, D_PAD)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if SINKS:
        top, total = tl.load(sinks + head), tl.full([], 1.0, tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for first in range(start, stop, TURN):
        p = first + tl.arange(0, TURN)
        cell = p.to(tl.int64) * num_heads + head
        each = tl.load(part_lse + cell, mask=p < stop, other=float("-inf"))
        o = tl.load(part + cell[:, None] * D + d[None, :], mask=(p < stop)[:, None] & (d < D)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(each, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, decay = tl.exp(each - shift), tl.exp(top - shift)
        # what an empty part left in memory is dropped by its weight
        acc = acc * decay + tl.sum(tl.where(weight[:, None] > 0.0, o, 0.0) * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        top = new_top
    whole = tl.where(total == 0.0, 1.0, total)
    here = row * num_heads + head
    tl.store(out + here * D + d, (acc / whole).to(out.dtype.element_ty), mask=d < D)
    tl.store(lse + here, tl.where(total == 0.0, float("-inf"), top + tl.log(whole)))


def merge_parts(
    partials: Partials, dtype: torch.dtype, *, sinks: torch.Tensor | None = None, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the partials of each row of one rank: [R, Q, D] in ``dtype`` and lse [R, Q].

    Rows that have one partial each are returned as they are. ``sinks`` [Q] float32 join, where these are all partials
    of the rows; lse may then be with or without them. ``pdl`` launches programmatically dependent.
    """
    part, part_lse, part_start = partials.out, partials.lse, partials.part_start
    if part_start is None:
        return (part if sinks is None else join_sinks(part, part_lse, sinks)).to(dtype), part_lse
    rows, (_, heads, head_dim) = partials.num_rows, part.shape
    if not (part.is_cuda or triton.knobs.runtime.interpret):
        index = part_start[:-1] + torch.arange(partials.most).unsqueeze(1)  # [most, R]
        seen = index < part_start[1:]
        index = index.clamp(max=part.shape[0] - 1)
        out, lse = merge_reference(part[index], part_lse[index].masked_fill(~seen.unsqueeze(-1), -torch.inf))
        return (out if sinks is None else join_sinks(out, lse, sinks)).to(dtype), lse
    out = part.new_empty((rows, heads, head_dim), dtype=dtype)
    lse = part_lse.new_empty((rows, heads))
    if rows:
        few = rows * heads < FEW_HEADS
        columns = min(32, triton.next_power_of_2(head_dim)) if few else triton.next_power_of_2(head_dim)
        _merge_parts_kernel[(rows, heads, -(-head_dim // columns))](
            part, part_lse, part_start, part_lse if sinks is None else sinks, out, lse, heads, D=head_dim,
            D_PAD=columns, TURN=parts_at_once(rows * heads), SINKS=sinks is not None,
            num_warps=4 if few else 1, **early(pdl),
        )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["num_cells"])
def _merge_into_kernel(out, lse, part, part_lse, num_cells, D: tl.constexpr, D_PAD: tl.constexpr, CELLS: tl.constexpr):
    """CELLS heads of rows: what was merged so far, and one more partial of each."""
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    d = tl.arange(0, D_PAD)
    here = cell < num_cells
    at, inside = cell[:, None] * D + d[None, :], here[:, None] & (d < D)[None, :]
    old_lse = tl.load(lse + cell, mask=here, other=float("-inf"))
    new_lse = tl.load(part_lse + cell, mask=here, other=float("-inf"))
    top = tl.maximum(old_lse, new_lse)
    shift = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp(old_lse - shift), tl.exp(new_lse - shift)
    total = old + new
    whole = tl.where(total == 0.0, 1.0, total)
    value = tl.load(part + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where((new > 0.0)[:, None], value, 0.0)  # values of an empty partial may be NaN
    before = tl.where((old > 0.0)[:, None], tl.load(out + at, mask=inside, other=0.0), 0.0)
    merged = before * (old / whole)[:, None] + value * (new / whole)[:, None]
    tl.store(out + at, merged, mask=inside)
    tl.store(lse + cell, tl.where(total == 0.0, float("-inf"), shift + tl.log(whole)), mask=here)


def merge_into(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge one more partial of each row into what was merged so far, in place.

    Args:
        out: [R, Q, D] float32 (float64 where ``part`` is), packed; values under lse = -inf are ignored.
        lse: [R, Q], packed, -inf where nothing was merged yet.
        part: [R, Q, D], packed, over other keys than those merged so far; values under lse = -inf are ignored.
        part_lse: [R, Q], packed.
    """
    if not (out.is_cuda or triton.knobs.runtime.interpret) or out.dtype == torch.float64:
        merged, merged_lse = merge_reference(torch.stack((out, part.to(out.dtype))), torch.stack((lse, part_lse)))
        out.copy_(merged)
        lse.copy_(merged_lse)
        return
    num_cells, head_dim = lse.numel(), out.shape[-1]
    if num_cells:
        _merge_into_kernel[(-(-num_cells // CELLS),)](
            out, lse, part, part_lse, num_cells, D=head_dim, D_PAD=triton.next_power_of_2(head_dim), CELLS=CELLS,
            num_warps=4,
        )  # fmt: skip
