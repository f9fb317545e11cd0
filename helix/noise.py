"""Random numbers without a generator: a hash of (seed, position, stream, column), the same in any batch and
on any rank.

Shape letters: B rows.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

Ints = npt.NDArray[np.int64]
TOKEN_STREAM = 2**16 - 1  # part of the hash: another one would change the tokens of every seeded request
_STREAM = tl.constexpr(TOKEN_STREAM)
_LOW_32 = 0xFFFFFFFF


def gumbel(keys: Tensor, num: int, first: int = 0) -> Tensor:
    """Return [B, num] float32 standard Gumbel noise of the columns from ``first`` on.

    Small u decide who wins, and float32 is finest there.
    """
    u = _hash(keys, num, first).to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _hash(keys: Tensor, num: int, first: int = 0) -> Tensor:
    """Return [B, num] int64 in [0, 2**32), different in every column of a row."""
    columns = _mix_(torch.arange(first, first + num, dtype=torch.int64, device=keys.device))
    return _mix_(columns ^ keys[0][:, None]).bitwise_xor_(keys[1][:, None])


def row_keys(seeds: Ints, positions: Ints, stream: int) -> Ints:
    """Return two 32-bit keys a row, [2, B] int64, from seeds and positions [B] int64 (positions below 2**48)."""
    keys = np.repeat(np.array([[0x243F6A88], [0x05A308D3]]), len(seeds), 1)
    for word in (seeds & _LOW_32, seeds >> 32, positions & _LOW_32, (positions >> 32) | (stream << 16)):
        keys = _mix(((keys ^ word) + 0x1E3779B9) & _LOW_32)
    return keys


def _mix(x: Ints) -> Ints:
    """Do what ``_mix_`` does, on the host."""
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * multiplier) & _LOW_32
    return x ^ (x >> 15)


def _mix_(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64, in place, one to one. Multipliers below 2**31 cannot overflow int64."""
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x.bitwise_xor_(x >> shift).mul_(multiplier).bitwise_and_(_LOW_32)
    return x.bitwise_xor_(x >> 15)


@triton.jit
def gumbel_of(seed, position, columns):
    """What ``gumbel`` returns for the keys of one row, up to the rounding of logarithms: in a kernel, columns int32."""
    key0 = _row_key(0x243F6A88, seed, position)
    key1 = _row_key(0x05A308D3, seed, position)
    mixed = _mixed(_mixed(columns.to(tl.uint32)) ^ key0) ^ key1
    u = tl.minimum((mixed.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    rest = 1.0 - u
    e = tl.where(rest == 1.0, u, -tl.log(rest) * (u / tl.where(rest == 1.0, 1.0, 1.0 - rest)))  # -log1p(-u)
    return -tl.log(e)


@triton.jit
def _row_key(begin: tl.constexpr, seed, position):
    step = tl.full([], 0x1E3779B9, tl.uint32)
    key = _mixed((tl.full([], begin, tl.uint32) ^ seed.to(tl.uint32)) + step)
    key = _mixed((key ^ (seed >> 32).to(tl.uint32)) + step)
    key = _mixed((key ^ position.to(tl.uint32)) + step)
    return _mixed((key ^ ((position >> 32) | (_STREAM << 16)).to(tl.uint32)) + step)


@triton.jit
def _mixed(x):
    x = x ^ (x >> 16)
    x = x * tl.full(x.shape, 0x21F0AAAD, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full(x.shape, 0x735A2D97, tl.uint32)
    return x ^ (x >> 15)
