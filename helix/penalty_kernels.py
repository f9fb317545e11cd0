"""Penalties on logits by counts of tokens, and the counting: Triton on GPUs, PyTorch elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048
_TIMES = (1 << 30) - 1  # the count in an entry; the bit above it says that the prompt has the token


def penalise(logits: Tensor, counts: Tensor, slots: Tensor, amounts: Tensor, drafts: Tensor, first_id: int) -> Tensor:
    """Return float32 logits; see ``TokenCounts.penalised``. Repetition first, then presence and frequency."""
    rows, columns = logits.shape
    if logits.is_cuda:
        out = torch.empty((rows, columns), dtype=torch.float32, device=logits.device)
        _penalise_kernel[(rows, triton.cdiv(columns, CHUNK))](
            logits, out, counts, slots, amounts, drafts, columns, logits.stride(0), rows, drafts.shape[1], first_id,
            CHUNK=CHUNK,
        )  # fmt: skip
        return out
    seen = counts[slots.clamp(min=0)].clone()
    local = drafts - first_id
    inside = (local >= 0) & (local < columns)
    seen.scatter_add_(1, torch.where(inside, local, 0), inside.to(torch.int32))
    seen.masked_fill_((slots < 0)[:, None], 0)
    times = seen & _TIMES
    value = logits.float()
    repetition = amounts[0].float()[:, None]
    repeated = torch.where(value > 0, value / repetition, value * repetition)
    value = torch.where(seen > 0, repeated, value)
    subtract = (amounts[1][:, None] + times * amounts[2][:, None]).float()
    return torch.where(times > 0, value - subtract, value)


def count_tokens(counts: Tensor, tokens: Tensor, slots: Tensor, first_id: int) -> None:
    """Add 1 to counts[slot, token - first_id] of each row whose token is there and whose slot is not -1."""
    if counts.is_cuda:
        _count_kernel[(len(tokens),)](counts, tokens, slots, counts.shape[1], first_id)
        return
    local = tokens - first_id
    inside = (slots >= 0) & (local >= 0) & (local < counts.shape[1])
    counts[slots[inside], local[inside]] += 1


@triton.jit(do_not_specialize=["columns", "rows", "num_drafts", "first_id"])
def _penalise_kernel(
    logits, out, counts, slots, amounts, drafts, columns, row_stride, rows, num_drafts, first_id, CHUNK: tl.constexpr
):
    row = tl.program_id(0)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = at < columns
    value = tl.load(logits + row.to(tl.int64) * row_stride + at, mask=there, other=0.0).to(tl.float32)
    slot = tl.load(slots + row)
    if slot >= 0:
        seen = tl.load(counts + slot * columns + at, mask=there, other=0)
        for draft in range(num_drafts):
            seen += (at + first_id == tl.load(drafts + row * num_drafts + draft)).to(tl.int32)
        times = seen & ((1 << 30) - 1)
        repetition = tl.zeros_like(value) + tl.load(amounts + row).to(tl.float32)
        repeated = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
        value = tl.where(seen > 0, repeated, value)
        presence, frequency = tl.load(amounts + rows + row), tl.load(amounts + 2 * rows + row)
        subtract = (presence + times.to(tl.float64) * frequency).to(tl.float32)
        value = tl.where(times > 0, value - subtract, value)
    tl.store(out + row.to(tl.int64) * columns + at, value, mask=there)


@triton.jit(do_not_specialize=["columns", "first_id"])
def _count_kernel(counts, tokens, slots, columns, first_id):
    row = tl.program_id(0)
    slot, local = tl.load(slots + row), tl.load(tokens + row) - first_id
    if (slot >= 0) & (local >= 0) & (local < columns):
        tl.atomic_add(counts + slot * columns + local, 1)
