"""The gate of a feed-forward of many rows: silu(gate) * up, read and written once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def _silu_mul_kernel(gate_up, out, units, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * units + n, mask=n < units, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * units + units + n, mask=n < units, other=0.0).to(tl.float32)
    # rounded where torch rounds
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * units + n, (activated * up).to(out.dtype.element_ty), mask=n < units)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up: [R, F] of a packed [R, 2 F], the gate's columns first."""
    if not gate_up.is_cuda:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    return silu_mul_kernel(gate_up)


def silu_mul_kernel(gate_up: torch.Tensor) -> torch.Tensor:
    """Do what ``silu_mul`` does in one Triton launch."""
    rows, units = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, units))
    if rows and units:
        _silu_mul_kernel[(rows, -(-units // BLOCK))](gate_up, out, units, BLOCK=BLOCK, num_warps=4)
    return out
