"""Probability mass as integers: e**((x - top) / T) in steps of 2**-40, the same bits on CPUs and GPUs and in any order.

A sum of floats depends on its order, and an exponential on the library. Here the distance to the row's largest logit
is taken in float32, by one subtraction and one multiplication that round alike everywhere, and the rest is integers:
2**-distance from a polynomial of degree 6 in 32-bit fixed point (error below 2**-27), monotone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

FAR = 64.0
"""Binary orders below the largest; a token so far has no mass."""
_STEPS = 1 << 20  # of a binary order
_C1, _C2, _C3, _C4, _C5, _C6 = 0xB17217E0, 0x3D7F7520, 0x0E35335E, 0x0274F5C7, 0x0054A8A1, 0x0007890F
_COEFFICIENTS = (_C6, _C5, _C4, _C3, _C2, _C1)
ORDERS_PER_NAT = 1 / math.log(2)


def distance(logits: torch.Tensor, top: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 [B, V], how far logits lie below the row's ``top`` [B, 1], in binary orders of probability.

    ``scale`` [B, 1] float32 is 1 / (T ln 2).
    """
    return (top - logits) * scale


def mass(distance: torch.Tensor) -> torch.Tensor:
    """Return int64, 2**-distance in steps of 2**-40; 0 from 40 on. Fewer than 2**22 of them add up below 2**62."""
    steps = (distance.clamp(max=FAR) * _STEPS).to(torch.int64)
    part = (steps & (_STEPS - 1)) << 12
    term = torch.full_like(part, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        term = coefficient - ((part * term) >> 32)
    return ((0xFFFFFFFF - ((part * term) >> 32)) << 8) >> (steps >> 20)


@triton.jit
def mass_of(distance):
    """What ``mass`` returns, in a kernel."""
    steps = (tl.minimum(distance, 64.0) * 1048576.0).to(tl.int32)
    part = ((steps & 0xFFFFF) << 12).to(tl.uint32)
    term = tl.full(part.shape, 0x0007890F, tl.uint32)
    term = 0x0054A8A1 - tl.umulhi(part, term)
    term = 0x0274F5C7 - tl.umulhi(part, term)
    term = 0x0E35335E - tl.umulhi(part, term)
    term = 0x3D7F7520 - tl.umulhi(part, term)
    term = tl.full(part.shape, 0xB17217E0, tl.uint32) - tl.umulhi(part, term)
    whole = tl.full(part.shape, 0xFFFFFFFF, tl.uint32) - tl.umulhi(part, term)
    return (whole.to(tl.int64) << 8) >> (steps >> 20).to(tl.int64)
