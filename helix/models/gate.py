"""Gates: of a feed-forward of many rows, of attention's heads, and of what shared experts add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from attention.append import load_sum
from parallel.device import early

BLOCK = 2048


@triton.jit
def gated(gate, up):
    """Return silu(gate) * up, rounded to their dtype where torch rounds."""
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (activated * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _silu_mul_kernel(gate_up, out, units, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * units + n, mask=n < units, other=0.0)
    up = tl.load(gate_up + row * 2 * units + units + n, mask=n < units, other=0.0)
    tl.store(out + row * units + n, gated(gate, up), mask=n < units)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up: [R, F] of a packed [R, 2 F], the gate's columns first."""
    if not gate_up.is_cuda:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    return silu_mul_kernel(gate_up)


def silu_mul_kernel(gate_up: torch.Tensor) -> torch.Tensor:
    """Do what ``silu_mul`` does in one Triton launch."""
    rows, units = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, units))
    if rows and units:
        _silu_mul_kernel[(rows, -(-units // BLOCK))](gate_up, out, units, BLOCK=BLOCK, num_warps=4)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _gate_heads_kernel(
    x, scores, out, num_rows, columns, SUMMANDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    here = n < columns
    score = load_sum(scores, num_rows * columns, row * columns + n, here, SUMMANDS, out.dtype.element_ty)
    gate = (1.0 / (1.0 + tl.exp(-score.to(tl.float32)))).to(out.dtype.element_ty).to(tl.float32)
    value = tl.load(x + row * columns + n, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * columns + n, (value * gate).to(out.dtype.element_ty), mask=here)


def gate_heads(x: torch.Tensor, scores: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Return x times sigmoid(scores): [R, H, D] of x [R, H, D] and scores [S, R, H * D], as their sum over S."""
    if not x.is_cuda:
        return x * scores.sum(0).to(x.dtype).sigmoid().view_as(x)
    return gate_heads_kernel(x, scores, pdl=pdl)


def gate_heads_kernel(x: torch.Tensor, scores: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Do what ``gate_heads`` does in one Triton launch."""
    (summands, rows, columns), out = scores.shape, torch.empty_like(x)
    if rows:
        _gate_heads_kernel[(rows, -(-columns // BLOCK))](
            x, scores, out, rows, columns, SUMMANDS=summands, BLOCK=BLOCK, num_warps=4, **early(pdl),
        )  # fmt: skip
    return out


@triton.jit
def _gate_rows_kernel(
    hidden, x, router, units, columns, UNITS_PAD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        n = start + tl.arange(0, BLOCK)
        weight = tl.load(router + n, mask=n < columns, other=0.0).to(tl.float32)
        total += weight * tl.load(x + row * columns + n, mask=n < columns, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-tl.sum(total, 0)))
    unit = tl.arange(0, UNITS_PAD)
    value = tl.load(hidden + row * units + unit, mask=unit < units, other=0.0).to(tl.float32)
    tl.store(hidden + row * units + unit, (value * gate).to(hidden.dtype.element_ty), mask=unit < units)


def gate_rows(hidden: torch.Tensor, x: torch.Tensor, router: torch.Tensor | None, *, pdl: bool = False) -> torch.Tensor:
    """Return hidden [R, F] times sigmoid(x router^T), x [R, h] and router [1, h]; as it is where there is no router."""
    if router is None:
        return hidden
    if not hidden.is_cuda:
        return hidden * F.linear(x, router).sigmoid()
    return gate_rows_kernel(hidden, x, router, pdl=pdl)


def gate_rows_kernel(hidden: torch.Tensor, x: torch.Tensor, router: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Do what ``gate_rows`` does in one Triton launch, in place."""
    (rows, units), columns = hidden.shape, x.shape[1]
    if rows and units:
        _gate_rows_kernel[(rows,)](
            hidden, x, router, units, columns, UNITS_PAD=triton.next_power_of_2(units), BLOCK=BLOCK,
            num_warps=4, **early(pdl),
        )  # fmt: skip
    return hidden
