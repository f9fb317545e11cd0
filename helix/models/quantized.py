"""A matrix of 8-bit floats with its scales, and products that widen a tile of it at a time.

The scale of an element belongs to its block of 128 x 128 in the whole matrix, and a rank's slice may begin and end
anywhere in a block. So a slice keeps the scale of each of its rows, for each block of columns that it touches, and how
many columns of the first block stand before it: any width works, and rows of several matrices may be stacked. That is
4 bytes for 128 columns of a row, 3% of the matrix; where scales belong to rows or to whole matrices, they are repeated.

Shape letters: N rows, K columns, B blocks of columns, E matrices, R rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .quantization import BLOCK, num_blocks

VALUES = torch.float8_e4m3fn
ALIGNMENT = 16  # bytes that a row's beginning is a multiple of, as copies of tiles need it
TILE = 1 << 22  # elements that are widened at a time
LARGEST = torch.finfo(VALUES).max  # 448


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix, or E of them: element [n, k] is values[n, k] * scales[(shift + k) // BLOCK, n].

    Attributes:
        values: [N, K] or [E, N, K] float8_e4m3fn; a row begins at a multiple of ALIGNMENT bytes.
        scales: [B, N] or [B, E * N] float32.
        shift: columns of the first block that stand before this slice.
    """

    values: torch.Tensor
    scales: torch.Tensor
    shift: int

    @classmethod
    def empty(cls, rows: int, columns: tuple[int, int], device: torch.device | str) -> Quantized:
        """Return room for `rows` rows of a matrix's `columns`, a half-open range."""
        start, stop = columns
        width = stop - start
        padded = -(-width // ALIGNMENT) * ALIGNMENT
        values = torch.empty((rows, padded), dtype=VALUES, device=device)[:, :width]
        scales = torch.empty((num_blocks(start, stop), rows), dtype=torch.float32, device=device)
        return cls(values, scales, start % BLOCK)

    @property
    def shape(self) -> torch.Size:
        """[N, K] or [E, N, K]."""
        return self.values.shape

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a GPU."""
        return self.values.is_cuda

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, padding and scales included."""
        rows = self.values.numel() // max(1, self.values.shape[-1])
        return rows * self.values.stride(-2) + self.scales.nbytes

    def numel(self) -> int:
        """Return the number of elements."""
        return self.values.numel()

    def unflatten(self, dim: int, sizes: tuple[int, int]) -> Quantized:
        """Return the rows as those of several matrices, one after the other: [E, N, K]."""
        return replace(self, values=self.values.unflatten(dim, sizes))

    def __getitem__(self, index: int) -> Quantized:
        """Return one of several matrices."""
        rows = self.values.shape[1]
        return replace(self, values=self.values[index], scales=self.scales[:, index * rows : (index + 1) * rows])

    def widen(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows from `start` to `stop` of a matrix as they are meant, in `dtype`: [stop - start, K].

        The product of value and scale is rounded to float32 first, unless `dtype` is wider.
        """
        values, scales = self.values[start:stop], self.scales[:, start:stop]
        if self.is_cuda and dtype != torch.float64:
            return _widened(values, scales, self.shift, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        block = torch.arange(self.shift, self.shift + values.shape[1], device=values.device) // BLOCK
        return (values.to(exact) * scales[block].T).to(dtype)


Matrix = torch.Tensor | Quantized


def product(x: torch.Tensor, w: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed, plus bias [N], by the library: [R, N] in x's dtype.

    A quantised w is widened to x's dtype tile by tile, never as a whole.
    """
    if isinstance(w, torch.Tensor):
        return F.linear(x, w, bias)
    rows, columns = w.shape
    out = x.new_empty((x.shape[0], rows))
    step = max(1, TILE // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        its_bias = None if bias is None else bias[start:stop]
        out[:, start:stop] = F.linear(x, w.widen(start, stop, x.dtype), its_bias)
    return out


@triton.jit
def as_float(byte):
    """Return in float32 what 8 bits (uint8) mean as e4m3; exact, on any GPU. NaN is 480."""
    bits = byte.to(tl.int32)
    # sign and magnitude move to where a float32 has them; its exponent counts from 120 less
    magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(bits > 127, -magnitude, magnitude)


@triton.jit
def _widen_kernel(
    values, scales, out, num_rows, num_columns, stride, scale_stride, shift,
    BN: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, k] = values[n, k] * scales[block of k, n], for BN rows and one block of columns."""
    block = tl.program_id(1)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), block * BLOCK - shift + tl.arange(0, BK)
    scale = tl.load(scales + block.to(tl.int64) * scale_stride + n, mask=n < num_rows, other=0.0)
    here = (n < num_rows)[:, None] & ((k >= 0) & (k < num_columns))[None, :]
    wide = as_float(tl.load(values + n.to(tl.int64)[:, None] * stride + k[None, :], mask=here, other=0))
    to = out + n.to(tl.int64)[:, None] * num_columns + k[None, :]
    tl.store(to, (wide * scale[:, None]).to(out.dtype.element_ty), mask=here)


def _widened(values: torch.Tensor, scales: torch.Tensor, shift: int, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = values.shape
    out = torch.empty((rows, columns), dtype=dtype, device=values.device)
    if out.numel():
        _widen_kernel[(-(-rows // 32), scales.shape[0])](
            values.view(torch.uint8), scales, out, rows, columns, values.stride(0), scales.stride(0), shift,
            BN=32, BK=BLOCK, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def quantize_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w [N, K] in 8 bits, [N, K] float8_e4m3fn, and the scales of its blocks: [N / BLOCK, K / BLOCK] float32.

    A block's largest value becomes the largest of e4m3.
    """
    rows, columns = w.shape
    padded = F.pad(w.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    largest = padded.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    values = (w / _spread(scales, rows, columns)).clamp(-LARGEST, LARGEST).to(VALUES)
    return values, scales


def quantize(w: torch.Tensor) -> Quantized:
    """Return w [N, K], whole, in 8 bits with the scales of its blocks."""
    values, scales = quantize_blocks(w)
    out = Quantized.empty(w.shape[0], (0, w.shape[1]), w.device)
    out.values.copy_(values)
    out.scales.copy_(scales.repeat_interleave(BLOCK, 0)[: w.shape[0]].T)
    return out


def widen_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return in float32 what ``quantize_blocks`` made: [N, K]."""
    return values.float() * _spread(scales, *values.shape)


def _spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the scale of each element: [N, K]."""
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
