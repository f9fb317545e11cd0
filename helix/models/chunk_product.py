"""Products of many rows with quantised matrices, both operands in 8 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3).

A chunk of a prompt is bound by its products, and those of 8 bits are faster. Each row's elements in a block of columns
share a scale, made from the largest of them; blocks are those of the whole matrix, as the weights' are, so the products
of one block are multiplied by a scale of the row and one of the column. Sums over blocks are in float32.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import triton
import triton.language as tl
from torch.nn.functional import ScalingType, scaled_mm
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from parallel.device import capability
from parallel.eight_bits import RowsInEightBits, quantize_groups

from .gate import gated, silu_mul
from .multiply_blocks import multiply_blocks_kernel
from .quantization import BLOCK
from .quantized import GROUP, LARGEST, VALUES, Matrix, Quantized

GROUP_ROWS = 64  # rows of a tile that a group of warps multiplies
TILE_ROWS, TILE_COLUMNS = 2 * GROUP_ROWS, 128  # of one expert
STAGES = {2: 6, 3: 5}  # by groups of warps
REGISTERS = {2: 168, 3: 128}  # a thread's, by groups; the warp that asks counts as four
SHARED_ROWS = 8  # tiles of x whose programs follow each other, so that the cache holds what they share of w


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x, row_of, values, scales, num_rows, num_columns, width, scale_stride, shift, begin,
    BM: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, POWERS: tl.constexpr,
    GATHER: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Quantise BM rows, or what their gates let through, in one block of columns, in the order of these in memory."""
    block = tl.program_id(1)
    m, i = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BLOCK)
    k, p = block * BLOCK - shift + i, block * BLOCK - begin + i
    row = m.to(tl.int64)
    if GATHER:
        row = tl.load(row_of + m, mask=m < num_rows, other=-1).to(tl.int64)
    there = (m < num_rows) & (row >= 0)
    here = there[:, None] & ((k >= 0) & (k < num_columns))[None, :]
    if GATED:
        at = x + row[:, None] * 2 * num_columns + k[None, :]
        value = gated(tl.load(at, mask=here, other=0.0), tl.load(at + num_columns, mask=here, other=0.0))
    else:
        value = tl.load(x + row[:, None] * num_columns + k[None, :], mask=here, other=0.0)
    value, scale = quantize_groups(value.to(tl.float32), POWERS, values.dtype.element_ty, LARGEST, GROUP)
    to = values + m.to(tl.int64)[:, None] * width + p[None, :]
    tl.store(to, value, mask=there[:, None] & ((p >= 0) & (p < width))[None, :])
    tl.store(scales + block.to(tl.int64) * scale_stride + m, scale, mask=there)


def quantize_rows(
    x: torch.Tensor, w: Quantized, row_of: torch.Tensor | None = None, *, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows in 8 bits, to be multiplied with w: [R, P] float8_e4m3fn, and [B, R] float32, their scales.

    Columns are in the order in which w's are stored.

    Args:
        x: [M, K]; where ``gated`` [M, 2 K], and rows are what ``silu_mul`` makes of it.
        w: the matrix, or several.
        row_of: [R] int32, which row of x each of these is; none where -1, and what is there is left as it was. None:
            all rows.
    """
    num_rows, width = (x if row_of is None else row_of).shape[0], w.values.shape[-1]
    padded = -(-num_rows // 4) * 4  # copies of tiles begin at multiples of 16 bytes
    values = torch.empty((padded, width), dtype=VALUES, device=x.device)
    scales = torch.empty((w.scales.shape[0], padded), dtype=torch.float32, device=x.device)
    _quantize_kernel[(-(-num_rows // 16), scales.shape[0])](
        x.contiguous(), x if row_of is None else row_of, values, scales, num_rows, w.width, width, padded, w.shift,
        w.shift - w.lead, BM=16, BLOCK=BLOCK, GROUP=GROUP, LARGEST=LARGEST, POWERS=w.powers_of_two,
        GATHER=row_of is not None, GATED=gated, num_warps=4,
    )  # fmt: skip
    return values[:num_rows], scales[:, :num_rows]


def can_multiply_in_8_bits(w: Matrix, x: torch.Tensor) -> TypeGuard[Quantized]:
    """Return whether the device multiplies x [R, K], of a 2-byte dtype, with w in 8 bits: Hopper GPUs.

    Scales of one of several matrices, or parts, begin at multiples of 16 bytes.
    """
    if not (isinstance(w, Quantized) and x.is_cuda and x.dim() == 2 and x.element_size() == 2):
        return False
    return w.shape[-2] % 8 == 0 and x.numel() > 0 and w.numel() > 0 and capability(x.device)[0] == 9


def product_in_8_bits(
    x: torch.Tensor, w: Quantized, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed, plus bias [N], x quantised on the way: [R, N] in x's dtype.

    Where ``gated``, w is [2 N, K], the gate's rows first, and what is returned silu(x gate^T) * (x up^T).
    """
    out = _product(quantize_rows(x, w), w, x.dtype, bias, gated=gated)
    return silu_mul(out) if gated and w.grid is not None else out


def product_of_rows(x: RowsInEightBits, w: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what ``product_in_8_bits`` does of rows that are quantised already, with all of w's columns."""
    return _product((x.values, x.scales), w, x.dtype, bias, gated=False)


def feed_forward_in_8_bits(x: torch.Tensor | RowsInEightBits, gate_up: Quantized, down: Quantized) -> torch.Tensor:
    """Return what two calls of ``product_in_8_bits`` would, the first gated: [R, h].

    Units are quantised as their gates let them through: they are the largest of a layer's activations.
    """
    rows = (x.values, x.scales) if isinstance(x, RowsInEightBits) else quantize_rows(x, gate_up)
    units = _product(rows, gate_up, x.dtype, None, gated=True)
    return _product(quantize_rows(units, down, gated=gate_up.grid is not None), down, x.dtype, None, gated=False)


def _product(
    rows: tuple[torch.Tensor, torch.Tensor], w: Quantized, dtype: torch.dtype, bias: torch.Tensor | None, *, gated: bool
) -> torch.Tensor:
    """Return rows that are quantised times w; where ``gated``, the library leaves the gate to the caller: [R, 2 N]."""
    grid = w.grid
    if grid is None:
        return multiply(rows, w, dtype, bias, gated=gated)
    return _library_product(rows, w, grid, dtype, bias)


def _library_product(
    rows: tuple[torch.Tensor, torch.Tensor],
    w: Quantized,
    grid: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return rows that are quantised times w, whose blocks of 128 x 128 are whole, by cuBLAS: [R, N] in ``dtype``."""
    values, scales = rows
    padded = scales.stride(0)  # rows of the room that they are in
    values, scales = (
        values.as_strided((padded, values.shape[1]), values.stride()),
        scales.as_strided((scales.shape[0], padded), scales.stride()),
    )
    out = scaled_mm(
        values, w.values.t(), scales.t(), ScalingType.BlockWise1x128, grid.t(), ScalingType.BlockWise128x128,
        bias=bias, output_dtype=dtype,
    )  # fmt: skip
    return out[: rows[0].shape[0]]


def multiply(
    rows: tuple[torch.Tensor, torch.Tensor],
    w: Quantized,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    *,
    gated: bool,
    expert_of: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what ``product_in_8_bits`` does of rows that are quantised: [R, N] in ``dtype``.

    expert_of: [R / TILE_ROWS] int32: which of several matrices [E, N, K] a tile of rows is multiplied with; E and more
        where none, and what is there is left as it was.
    """
    values, scales = rows
    parts = 2 if gated else 1
    num_rows, columns, half = values.shape[0], w.shape[-2] // parts, TILE_COLUMNS // parts
    out = torch.empty((num_rows, columns), dtype=dtype, device=values.device)
    matrices = (w.values if w.values.dim() == 2 else w.values.flatten(0, 1)).unflatten(0, (-1, columns))
    even = w.shares_scales(columns, TILE_COLUMNS // 2)
    groups = 3 if even and expert_of is None else 2  # a scale for each column takes registers
    num_tiles = -(-num_rows // (groups * GROUP_ROWS)) * -(-columns // half)
    programs = min(num_tiles, torch.cuda.get_device_properties(values.device).multi_processor_count)
    multiply_blocks_kernel[(programs,)](
        _tiles(values, [GROUP_ROWS, BLOCK]), _tiles(matrices, [parts, half, BLOCK]), _tiles(scales, [1, GROUP_ROWS]),
        _tiles(w.scales, [1, half]), out if bias is None else bias, out, out if expert_of is None else expert_of,
        matrices.shape[0] // parts, num_rows, columns, scales.shape[0], num_tiles, w.shift - w.lead,
        GROUPS=groups, STAGES=STAGES[groups], SHARED_ROWS=SHARED_ROWS, EVEN=even,
        HAS_BIAS=bias is not None, EXPERTS=expert_of is not None, num_warps=4, maxnreg=REGISTERS[groups],
    )  # fmt: skip
    return out


def _tiles(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    if tensor.dtype == torch.float32:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    else:
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)
