"""Queues of experts cut into blocks of rows, and their products in 8 bits.

Every expert has a queue of the pairs (a row and one of the experts that it chose) that chose it. All queues together
are worked off in blocks of so many pairs, each of one expert; how many blocks there could be depends on sizes alone.
In 8 bits a block's rows are gathered when they are quantised, so that what follows reads and writes whole tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .chunk_product import TILE_ROWS, multiply, quantize_rows
from .quantized import Quantized


@triton.jit
def block_of(counts, queues, num_rows, block, HELD: tl.constexpr, HELD_PAD: tl.constexpr, BM: tl.constexpr):
    """Return the expert of a block of all queues, its pairs [BM], and which of them are real: none past the last."""
    e = tl.arange(0, HELD_PAD)
    count = tl.load(counts + e, mask=e < HELD, other=0)
    blocks = (count + BM - 1) // BM
    stop = tl.cumsum(blocks, 0)
    expert = tl.sum((stop <= block).to(tl.int32), 0)
    its = e == expert
    i = (block - tl.sum(tl.where(its, stop - blocks, 0), 0)) * BM + tl.arange(0, BM)
    real = i < tl.sum(tl.where(its, count, 0), 0)
    expert = expert.to(tl.int64)
    return expert, tl.load(queues + expert * num_rows + i, mask=real, other=0).to(tl.int64), real


@triton.jit
def _place_kernel(
    counts, queues, row_of, self_of, place_of, expert_of, num_rows,
    HELD: tl.constexpr, HELD_PAD: tl.constexpr, CHOSEN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Give the pairs of one block places that follow each other."""
    block = tl.program_id(0)
    expert, pair, real = block_of(counts, queues, num_rows, block, HELD, HELD_PAD, BM)
    place = block * BM + tl.arange(0, BM)
    tl.store(expert_of + block, expert.to(tl.int32))
    tl.store(row_of + place, tl.where(real, pair // CHOSEN, -1).to(tl.int32))
    tl.store(self_of + place, tl.where(real, place, -1))
    tl.store(place_of + pair, place, mask=real)


def num_blocks_of(num_pairs: int, num_held: int, rows: int) -> int:
    """Return how many blocks of so many rows there could be."""
    return min(num_pairs, num_pairs // rows + num_held)


def feed_forward_in_8_bits(
    x: torch.Tensor, gate_up: Quantized, down: Quantized, counts: torch.Tensor, queues: torch.Tensor, num_pairs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what experts make of their pairs, in any order [places, h] in x's dtype, and each pair's place.

    Args:
        x: [R, h] of a 2-byte dtype, on a GPU that multiplies in 8 bits.
        gate_up: [E, 2 F, h], the gate's rows first.
        down: [E, h, F].
        counts: [E] int32, how many pairs each queue has.
        queues: [E, R] int32, the pairs.
        num_pairs: how many there are in all rows, of any rank's experts.
    """
    num_held, num_rows = queues.shape
    num_blocks = num_blocks_of(num_pairs, num_held, TILE_ROWS)
    row_of, self_of = counts.new_empty((2, num_blocks * TILE_ROWS))
    place_of, expert_of = counts.new_empty(num_pairs), counts.new_empty(num_blocks)
    _place_kernel[(num_blocks,)](
        counts, queues, row_of, self_of, place_of, expert_of, num_rows, HELD=num_held,
        HELD_PAD=triton.next_power_of_2(num_held), CHOSEN=num_pairs // num_rows, BM=TILE_ROWS, num_warps=4,
    )  # fmt: skip
    hidden = multiply(quantize_rows(x, gate_up, row_of), gate_up, x.dtype, gated=True, expert_of=expert_of)
    rows = quantize_rows(hidden, down, self_of)
    return multiply(rows, down, x.dtype, gated=False, expert_of=expert_of), place_of
