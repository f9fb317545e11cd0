"""Projections of few rows: a Triton kernel that reads the weights once at memory speed, and the library elsewhere.

A decode step's projections are bound by the bytes of their weights. The kernel gives each program a few output columns
and all of K, and fuses the gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

MAX_ROWS = 64


@triton.jit
def _silu_times(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _linear_kernel(
    x, w, bias, out, num_rows, x_stride, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[m, n] = x[m, :] . w[n, :] (+ bias), or silu(gate) * up of the two halves of w; N counts output columns."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    w_row = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BN, BM], tl.float32)
    acc_up = tl.zeros([BN, BM], tl.float32)
    x_col = x + m[None, :].to(tl.int64) * x_stride
    for at in range(0, K, BK):
        there = at + k < K
        xt = tl.load(x_col + (at + k)[:, None], mask=there[:, None] & (m < num_rows)[None, :], other=0.0)
        wt = tl.load(w_row + (at + k)[None, :], mask=there[None, :], other=0.0)
        acc = tl.dot(wt, xt, acc)
        if GATED:
            ut = tl.load(w_row + N * K + (at + k)[None, :], mask=there[None, :], other=0.0)
            acc_up = tl.dot(ut, xt, acc_up)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        dtype: tl.constexpr = out.dtype.element_ty
        acc = _silu_times(acc.to(dtype).to(tl.float32), acc_up.to(dtype).to(tl.float32))
    at_out = out + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < num_rows)[None, :])


@dataclass(frozen=True)
class LinearTile:
    """Output columns (BN) of a program, elements of K (BK) a turn, warps and pipeline stages."""

    bn: int
    bk: int
    warps: int
    stages: int


def choose_tile(depth: int, gated: bool) -> LinearTile:
    """Return the tile over K = depth; on an H200 it is the fastest for 1 to 32 rows of 7B to 9B shapes."""
    if gated:
        return LinearTile(bn=32, bk=128, warps=2, stages=4)
    return LinearTile(bn=32, bk=512 if depth >= 512 else 128, warps=4, stages=4)


def _run(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, columns: int, gated: bool, pdl: bool
) -> torch.Tensor:  # fmt: skip
    rows, depth = x.shape
    out = x.new_empty((rows, columns))
    tile = choose_tile(depth, gated)
    bm = min(max(8, triton.next_power_of_2(rows)), 64)
    _linear_kernel[(-(-columns // tile.bn), -(-rows // bm))](
        x, w, w if bias is None else bias, out, rows, x.stride(0),
        N=columns, K=depth, GATED=gated, HAS_BIAS=bias is not None,
        BM=bm, BN=tile.bn, BK=tile.bk, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def _by_kernel(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Few rows of a 2-byte dtype on CUDA, weights packed and aligned to the kernel's loads."""
    fits = x.is_cuda and x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.element_size() == 2
    return fits and w.is_contiguous() and x.shape[1] % 16 == 0 and x.shape[1] >= 64


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, *, pdl: bool = False) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed, plus bias [N]: [R, N] in x's dtype, summed in float32."""
    if _by_kernel(x, w):
        return _run(x, w, bias, w.shape[0], False, pdl)
    return F.linear(x, w, bias)


def gated_linear(x: torch.Tensor, gate_up: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Return silu(x gate^T) * (x up^T): [R, F] for gate_up [2 F, K], the gate's rows first."""
    if _by_kernel(x, gate_up):
        return _run(x, gate_up, None, gate_up.shape[0] // 2, True, pdl)
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.silu(gate) * up
