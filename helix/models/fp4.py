"""MXFP4 (OCP Microscaling Formats 1.0): 32 neighbours of a row as 16 bytes, and a power of two for them as one more.

An element has a sign, two bits of exponent and one of mantissa (e2m1); the first of two stands in a byte's low half. A
scale is its exponent and 127 (e8m0).
"""

import torch

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of the two tensors that stand for one."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)])


def widen_fp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return in float32, exactly, what bytes [..., G, 16] and scales [..., G], both uint8, mean: [..., G * 32]."""
    halves = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    return torch.ldexp(_VALUES[halves.long()], (scales.int() - 127).unsqueeze(-1)).flatten(-2)
