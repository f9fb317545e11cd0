"""Rows in 8 bits (e4m3) with a scale for each group of 128 columns, as they are made inside Triton kernels.

Columns are stored in groups of 16, the halves of a group interleaved (``helix.models.quantized`` says why), and the
scales of one block of columns follow each other row by row, which is how products of 8 bits read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

COLUMNS = 128  # that share a scale
INTERLEAVED = 16
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True, eq=False)
class RowsInEightBits:
    """R rows of h elements, whose columns are whole groups.

    Attributes:
        values: [R, h] float8_e4m3fn, columns in the order in which they are stored.
        scales: [h / COLUMNS, R] float32; a row of them begins at a multiple of 16 bytes.
        dtype: of the rows before, and of what products make of them.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def empty_like(cls, x: torch.Tensor) -> RowsInEightBits:
        """Return room for rows as many and as wide as x [R, h] has."""
        rows, columns = x.shape
        padded = -(-rows // 4) * 4  # copies of tiles begin at multiples of 16 bytes
        values = torch.empty((padded, columns), dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty((columns // COLUMNS, padded), dtype=torch.float32, device=x.device)
        return cls(values[:rows], scales[:, :rows], x.dtype)


@triton.jit
def quantize_groups(
    value, POWERS: tl.constexpr, DTYPE: tl.constexpr, LARGEST: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Return groups of columns [M, COLUMNS], float32, in 8 bits as they are stored, and their scales [M].

    POWERS: scales are rounded up to powers of two.
    """
    scale = tl.maximum(tl.max(tl.abs(value), 1), 1e-10) / LARGEST
    if POWERS:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    narrow = tl.clamp(value * (1.0 / scale)[:, None], -LARGEST, LARGEST).to(DTYPE)
    groups: tl.constexpr = value.shape[1] // INTERLEAVED
    halves = tl.reshape(narrow.to(tl.uint8, bitcast=True), [value.shape[0], groups, 2, INTERLEAVED // 2])
    stored = tl.reshape(tl.permute(halves, (0, 1, 3, 2)), [value.shape[0], value.shape[1]])
    return stored.to(DTYPE, bitcast=True), scale
