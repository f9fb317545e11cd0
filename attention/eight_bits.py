"""8-bit floats (e4m3) in Triton kernels, as bytes: exact on any GPU, and in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_float(byte):
    """Return in float32 what 8 bits (uint8) mean as e4m3; exact, on any GPU. NaN is 480."""
    bits = byte.to(tl.int32)
    # sign and magnitude move to where a float32 has them; its exponent counts from 120 less
    magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(bits > 127, -magnitude, magnitude)


@triton.jit
def as_byte(value):
    """Return the e4m3 nearest to float32 values of at most 448, the even one of two, as uint8."""
    bits = tl.abs(value).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2 ** -6 steps are 2 ** -9, as those of float32 are from 2 ** 14 on
    small = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(tl.abs(value) < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def scale_of(value, axis: tl.constexpr):
    """Return what maps the largest of float32 values to 448; 1 where all are 0."""
    largest = tl.max(tl.abs(value), axis)
    return tl.where(largest == 0.0, 1.0, largest * (1.0 / 448.0))


@triton.jit
def scaled(weight, v_nd, v_scale, dtype: tl.constexpr):
    """Return weights [M, N] and float32 values [N, D] in ``dtype``, one of them with the values' scales [N] in it.

    Weights take them in, so that values are only widened; but in float16, where small weights times small scales are 0.
    """
    if dtype == tl.float16:
        v_nd = v_nd * v_scale[:, None]
    else:
        weight = weight * v_scale[None, :]
    return weight, v_nd.to(dtype)
