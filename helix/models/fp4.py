"""MXFP4 (OCP Microscaling Formats 1.0): 32 neighbours of a row as 16 bytes, and a power of two for them as one more.

An element has a sign, two bits of exponent and one of mantissa (e2m1); the first of two stands in a byte's low half. A
scale is its exponent and 127 (e8m0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of the two tensors that stand for one."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def widen_fp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return in float32, exactly, what bytes [..., G, 16] and scales [..., G], both uint8, mean: [..., G * 32]."""
    import torch  # not above: the HTTP process, which has none, reads names of this module

    values = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)])
    halves = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    return torch.ldexp(values[halves.long()], (scales.int() - 127).unsqueeze(-1)).flatten(-2)
