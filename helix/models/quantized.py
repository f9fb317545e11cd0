"""A matrix of 8-bit floats with its scales, and products that widen a tile of it at a time.

The scale of an element belongs to its block of 128 x 128 in the whole matrix, and a rank's slice may begin and end
anywhere in a block. So a slice keeps the scale of each of its rows, for each block of columns that it touches, and how
many columns of the first block stand before it: any width works, and rows of several matrices may be stacked. That is
4 bytes for 128 columns of a row, 3% of the matrix; where scales belong to rows or to whole matrices, they are repeated.

Columns are stored in groups of 16, counted from the beginning of the whole matrix, the halves of a group interleaved:

    column of the group   0  8  1  9  2 10  3 11  4 12  5 13  6 14  7 15

A thread of the tensor core multiplies two neighbours of each half: so they are one word, which it widens in registers
(``stream_weights``). Groups that a slice cuts are filled with zeros. Whatever multiplies a whole row with such a matrix
puts the row into the same order first (``in_stored_order``), rather than to turn the matrix around.

Shape letters: N rows, K columns, P columns stored, B blocks of columns, E matrices, R rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .quantization import BLOCK, num_blocks

VALUES = torch.float8_e4m3fn
GROUP = 16  # columns that are stored together, and bytes that a row's beginning is a multiple of
TILE = 1 << 22  # elements that are widened at a time
LARGEST = torch.finfo(VALUES).max  # 448


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix, or E of them: element [n, k] is its value times scales[(shift + k) // BLOCK, n].

    Attributes:
        values: [N, P] or [E, N, P] float8_e4m3fn, columns in the order in which they are stored.
        scales: [B, N] or [B, E * N] float32; a row of them begins at a multiple of 16 bytes.
        shift: columns of the first block that stand before this slice.
        width: K.
        powers_of_two: whether scales of rows that are quantised to meet it are rounded up to powers of two.
        facts: what has been found out about all rows' scales, which do not change once a product has been made.
    """

    values: torch.Tensor
    scales: torch.Tensor
    shift: int
    width: int
    powers_of_two: bool = False
    facts: dict[tuple[int, ...], bool | torch.Tensor] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, rows: int, columns: tuple[int, int], device: torch.device | str, *, powers_of_two: bool = False
    ) -> Quantized:
        """Return room for `rows` rows of a matrix's `columns`, a half-open range."""
        start, stop = columns
        values = torch.zeros((rows, stored_width(start, stop - start)), dtype=torch.uint8, device=device).view(VALUES)
        padded = -(-rows // 4) * 4
        scales = torch.empty((num_blocks(start, stop), padded), dtype=torch.float32, device=device)[:, :rows]
        return cls(values, scales, start % BLOCK, stop - start, powers_of_two)

    @property
    def shape(self) -> torch.Size:
        """[N, K] or [E, N, K]."""
        return torch.Size((*self.values.shape[:-1], self.width))

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a GPU."""
        return self.values.is_cuda

    @property
    def lead(self) -> int:
        """How many zeros stand in the first group before the slice."""
        return self.shift % GROUP

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, padding and scales included."""
        return self.values.nbytes + self.scales.shape[0] * self.scales.stride(0) * self.scales.element_size()

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def unflatten(self, dim: int, sizes: tuple[int, int]) -> Quantized:
        """Return the rows as those of several matrices, one after the other: [E, N, K]."""
        return replace(self, values=self.values.unflatten(dim, sizes))

    def __getitem__(self, index: int) -> Quantized:
        """Return one of several matrices."""
        rows = self.values.shape[1]
        scales = self.scales[:, index * rows : (index + 1) * rows]
        return replace(self, values=self.values[index], scales=scales, facts={})

    def rows(self, start: int, stop: int) -> Quantized:
        """Return some rows of a matrix, as a view."""
        return replace(self, values=self.values[start:stop], scales=self.scales[:, start:stop], facts={})

    def shares_scales(self, rows: int, size: int) -> bool:
        """Return whether `size` rows that follow each other share their scales, counted anew every `rows` rows."""
        key = (self.scales.shape[1], rows, size)
        if key not in self.facts:
            per_matrix = self.scales.unflatten(1, (-1, rows))
            first = torch.arange(rows, device=self.scales.device) // size * size
            self.facts[key] = bool((per_matrix == per_matrix[..., first]).all())
        return bool(self.facts[key])

    @property
    def grid(self) -> torch.Tensor | None:
        """A matrix's scales by blocks, [N / BLOCK, B or up to 3 more] float32; None where a block is cut."""
        rows, width = self.shape
        if self.shift or rows % BLOCK or width % BLOCK or not self.shares_scales(rows, BLOCK):
            return None
        key = (self.scales.shape[1],)
        if key not in self.facts:
            self.facts[key] = F.pad(self.scales[:, ::BLOCK].T, (0, -self.scales.shape[0] % 4)).contiguous()
        grid = self.facts[key]
        assert isinstance(grid, torch.Tensor)
        return grid

    def put(self, start: int, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Fill rows from `start` on with `values` [n, K] in 8 bits and `scales` [B, n], of any device."""
        self.scales[:, start : start + values.shape[0]].copy_(scales)
        self.put_values(start, values)

    def put_values(self, start: int, values: torch.Tensor) -> None:
        """Fill rows from `start` on with `values` [n, K] in 8 bits, of any device; their scales stay as they are."""
        for rows in values.view(torch.uint8).split(max(1, TILE // max(1, self.width))):
            stored = in_stored_order(rows.to(self.values.device), self.shift)
            self.values[start : start + rows.shape[0]].view(torch.uint8).copy_(stored)
            start += rows.shape[0]

    def widen(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows from `start` to `stop` of a matrix as they are meant, in `dtype`: [stop - start, K].

        The product of value and scale is rounded to float32 first, unless `dtype` is wider.
        """
        stored = self.widen_stored(start, stop, dtype)
        columns = stored.unflatten(-1, (-1, GROUP // 2, 2)).mT.flatten(1)
        return columns[:, self.lead : self.lead + self.width]

    def widen_stored(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what ``widen`` does with columns in the order in which they are stored: [stop - start, P]."""
        values, scales = self.values[start:stop], self.scales[:, start:stop]
        begin = self.shift - self.lead
        if self.is_cuda and dtype != torch.float64:
            return _widened(values, scales, begin, dtype)
        return widen_slice(values, scales, begin, dtype)


def widen_slice(values: torch.Tensor, scales: torch.Tensor, shift: int, dtype: torch.dtype) -> torch.Tensor:
    """Return values [N, K] times scales [B, N], whose first block began `shift` columns earlier, in `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    block = torch.arange(shift, shift + values.shape[1], device=values.device) // BLOCK
    return (values.to(exact) * scales[block].T).to(dtype)


def stored_width(start: int, width: int) -> int:
    """Return how many columns are stored of so many that begin `start` columns after a group does: P."""
    return -(-(start % GROUP + width) // GROUP) * GROUP if width else 0


def in_stored_order(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Return x [R, K] with its columns as those of a slice with this `shift` are stored, zeros among them: [R, P]."""
    lead = shift % GROUP
    padded = F.pad(x, (lead, stored_width(lead, x.shape[1]) - lead - x.shape[1]))
    return padded.unflatten(-1, (-1, 2, GROUP // 2)).mT.flatten(1)


Matrix = torch.Tensor | Quantized


def product(x: torch.Tensor, w: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed, plus bias [N], by the library: [R, N] in x's dtype.

    A quantised w is widened to x's dtype tile by tile, never as a whole.
    """
    if isinstance(w, torch.Tensor):
        return F.linear(x, w, bias)
    rows, columns = w.shape
    out = x.new_empty((x.shape[0], rows))
    x = in_stored_order(x, w.shift)
    step = max(1, TILE // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        its_bias = None if bias is None else bias[start:stop]
        out[:, start:stop] = F.linear(x, w.widen_stored(start, stop, x.dtype), its_bias)
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
    values, scales, out, num_rows, num_columns, scale_stride, begin, BN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[n, p] = values[n, p] * scales[block of p, n], for BN rows and one block of columns."""
    block = tl.program_id(1)
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), block * BLOCK - begin + tl.arange(0, BLOCK)
    scale = tl.load(scales + block.to(tl.int64) * scale_stride + n, mask=n < num_rows, other=0.0)
    here = (n < num_rows)[:, None] & ((k >= 0) & (k < num_columns))[None, :]
    at = n.to(tl.int64)[:, None] * num_columns + k[None, :]
    wide = as_float(tl.load(values + at, mask=here, other=0))
    tl.store(out + at, (wide * scale[:, None]).to(out.dtype.element_ty), mask=here)


def _widened(values: torch.Tensor, scales: torch.Tensor, begin: int, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = values.shape
    out = torch.empty((rows, columns), dtype=dtype, device=values.device)
    if out.numel():
        _widen_kernel[(-(-rows // 32), scales.shape[0])](
            values.view(torch.uint8), scales, out, rows, columns, scales.stride(0), begin,
            BN=32, BLOCK=BLOCK, num_warps=4,
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
    out.put(0, values, scales.repeat_interleave(BLOCK, 0)[: w.shape[0]].T)
    return out


def widen_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return in float32 what ``quantize_blocks`` made: [N, K]."""
    return values.float() * _spread(scales, *values.shape)


def _spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the scale of each element: [N, K]."""
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
