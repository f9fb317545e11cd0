"""Random numbers without a generator: a hash of (seed, position, stream, column), the same in any batch and
on any rank.

Shape letters: B rows.
"""

import torch
from torch import Tensor

TOKEN_STREAM = 2**16 - 1  # part of the hash: another one would change the tokens of every seeded request
_LOW_32 = 0xFFFFFFFF


def gumbel(keys: Tensor, num: int) -> Tensor:
    """Return [B, num] float32 standard Gumbel noise. Small u decide who wins, and float32 is finest there."""
    u = _hash(keys, num).to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _hash(keys: Tensor, num: int) -> Tensor:
    """Return [B, num] int64 in [0, 2**32), different in every column of a row."""
    columns = _mix_(torch.arange(num, dtype=torch.int64, device=keys.device))
    return _mix_(columns ^ keys[0][:, None]).bitwise_xor_(keys[1][:, None])


def row_keys(seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """Return two 32-bit keys a row, [2, B] int64, from seeds and positions [B] int64 (positions below 2**48)."""
    keys = torch.tensor([[0x243F6A88], [0x05A308D3]], dtype=torch.int64).to(seeds.device, non_blocking=True)
    for word in (seeds & _LOW_32, seeds >> 32, positions & _LOW_32, (positions >> 32) | (stream << 16)):
        keys = _mix_((keys ^ word).add_(0x1E3779B9).bitwise_and_(_LOW_32))
    return keys


def _mix_(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64, in place, one to one. Multipliers below 2**31 cannot overflow int64."""
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x.bitwise_xor_(x >> shift).mul_(multiplier).bitwise_and_(_LOW_32)
    return x.bitwise_xor_(x >> 15)
