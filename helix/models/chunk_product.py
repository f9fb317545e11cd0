"""Products of many rows with quantised matrices, both operands in 8 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3).

A chunk of a prompt is bound by its products, and those of 8 bits are twice as fast. Each row's elements in a block of
columns share a scale, made from the largest of them; blocks are those of the whole matrix, as the weights' are, so the
products of one block are multiplied by a scale of the row and one of the column. Sums over blocks are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from parallel.device import capability

from .quantization import BLOCK
from .quantized import ALIGNMENT, LARGEST, VALUES, Quantized


@triton.jit
def _quantize_kernel(
    x, values, scales, num_rows, num_columns, stride, shift,
    BM: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, POWERS: tl.constexpr,
):  # fmt: skip
    """Quantise BM rows in one block of columns; POWERS rounds scales up to powers of two."""
    block = tl.program_id(1)
    m, k = tl.program_id(0) * BM + tl.arange(0, BM), block * BLOCK - shift + tl.arange(0, BLOCK)
    here = (m < num_rows)[:, None] & ((k >= 0) & (k < num_columns))[None, :]
    value = tl.load(x + m.to(tl.int64)[:, None] * num_columns + k[None, :], mask=here, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 1), 1e-10) / LARGEST
    if POWERS:
        scale = tl.exp2(tl.ceil(tl.log2(scale)))
    value = tl.clamp(value / scale[:, None], -LARGEST, LARGEST)
    tl.store(values + m.to(tl.int64)[:, None] * stride + k[None, :], value.to(values.dtype.element_ty), mask=here)
    tl.store(scales + block.to(tl.int64) * num_rows + m, scale, mask=m < num_rows)


@triton.jit
def _product_kernel(
    x, x_scales, w, w_scales, bias, out, num_rows, columns, depth, x_stride, w_stride, scale_stride, shift, num_blocks,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out[m, n] = x[m] . w[n] + bias[n]; GROUP programs that follow each other share rows of w."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BM), tl.cdiv(columns, BN)
    group = tl.program_id(0) // (GROUP * tiles_n)
    of_group = tl.minimum(tiles_m - group * GROUP, GROUP)
    in_group = tl.program_id(0) % (GROUP * tiles_n)
    m = (group * GROUP + in_group % of_group) * BM + tl.arange(0, BM)
    n = in_group // of_group * BN + tl.arange(0, BN)
    x_row, w_row = x + m.to(tl.int64)[:, None] * x_stride, w + n.to(tl.int64)[:, None] * w_stride
    acc = tl.zeros([BM, BN], tl.float32)
    for block in range(num_blocks):
        k = block * BK - shift + tl.arange(0, BK)
        inside = ((k >= 0) & (k < depth))[None, :]
        x_mk = tl.load(x_row + k[None, :], mask=(m < num_rows)[:, None] & inside, other=0.0)
        w_nk = tl.load(w_row + k[None, :], mask=(n < columns)[:, None] & inside, other=0.0)
        x_scale = tl.load(x_scales + block * num_rows + m, mask=m < num_rows, other=0.0)
        w_scale = tl.load(w_scales + block * scale_stride + n, mask=n < columns, other=0.0)
        acc += tl.dot(x_mk, tl.trans(w_nk)) * (x_scale[:, None] * w_scale[None, :])
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    to = out + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(m < num_rows)[:, None] & (n < columns)[None, :])


def quantize_rows(x: torch.Tensor, shift: int, *, powers_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [R, K] in 8 bits, [R, K] float8_e4m3fn, and the scale of each block of columns and row: [B, R] float32.

    shift: columns of the first block that stand before x's.
    """
    rows, columns = x.shape
    padded = -(-columns // ALIGNMENT) * ALIGNMENT
    values = torch.empty((rows, padded), dtype=VALUES, device=x.device)[:, :columns]
    scales = torch.empty((-(-(shift + columns) // BLOCK), rows), dtype=torch.float32, device=x.device)
    _quantize_kernel[(-(-rows // 16), scales.shape[0])](
        x.contiguous(), values, scales, rows, columns, padded, shift,
        BM=16, BLOCK=BLOCK, LARGEST=LARGEST, POWERS=powers_of_two, num_warps=4,
    )  # fmt: skip
    return values, scales


def can_multiply_in_8_bits(x: torch.Tensor, w: Quantized) -> bool:
    """Return whether the device multiplies x [R, K], of a 2-byte dtype, with w in 8 bits: GPUs from Hopper on."""
    return x.is_cuda and x.dim() == 2 and x.element_size() == 2 and w.numel() > 0 and capability(x.device) >= (9, 0)


def product_in_8_bits(x: torch.Tensor, w: Quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed, plus bias [N], with x quantised on the way: [R, N] in x's dtype."""
    values, scales = quantize_rows(x, w.shift, powers_of_two=w.powers_of_two)
    rows, columns = x.shape[0], w.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    _product_kernel[(-(-rows // 128) * -(-columns // 128),)](
        values, scales, w.values, w.scales, x if bias is None else bias, out, rows, columns, x.shape[1],
        values.stride(0), w.values.stride(0), w.scales.stride(0), w.shift, w.scales.shape[0],
        BM=128, BN=128, BK=BLOCK, GROUP=8, HAS_BIAS=bias is not None, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
