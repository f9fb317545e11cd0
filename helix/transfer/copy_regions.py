"""One kernel that copies any number of scattered regions, to memory of its own GPU or of one that it can reach."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from parallel.placement import IntArray

PIECE_BYTES = 32 << 10
PROGRAMS = 64
"""Most programs of a launch: enough for an NVLink, and half of a GPU's processors are left to what it computes."""
_WIDE = 16  # bytes that a thread moves at once, where addresses and sizes are multiples
_BLOCK_BYTES = {True: 16 << 10, False: 2 << 10}


def copy_regions(regions: IntArray, device: torch.device) -> list[torch.Tensor]:
    """Start to copy regions [N, 3] int64 (source address, target address, bytes) on the device's current stream.

    Args:
        regions: that do not overlap; of memory that the device reaches.
        device: whose kernel it is.

    Returns:
        What must live until the copies have ended.
    """
    is_wide = (regions[:, 0] | regions[:, 1] | regions[:, 2]) % _WIDE == 0
    parts = [(regions, True)] if is_wide.all() else [(regions[is_wide], True), (regions[~is_wide], False)]
    return [_launch(cut(part), device, wide) for part, wide in parts if len(part)]


def cut(regions: IntArray) -> IntArray:
    """Return regions [N, 3] cut into pieces of ``PIECE_BYTES`` at most."""
    counts = -(-regions[:, 2] // PIECE_BYTES)
    if not len(regions) or counts.max() == 1:
        return regions
    pieces = np.repeat(regions, counts, axis=0)
    at = (np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)) * PIECE_BYTES
    pieces[:, 0] += at
    pieces[:, 1] += at
    pieces[:, 2] = np.minimum(pieces[:, 2] - at, PIECE_BYTES)
    return pieces


def compile_copies(device: torch.device) -> None:
    """Compile what ``copy_regions`` launches, before the first that counts."""
    for wide in (True, False):
        _launch(np.zeros((1, 3), np.int64), device, wide)


def _launch(pieces: IntArray, device: torch.device, wide: bool) -> torch.Tensor:
    host = torch.empty(pieces.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    host.numpy()[...] = pieces
    table = host.to(device, non_blocking=True)
    _copy_kernel[(min(len(pieces), PROGRAMS),)](table, len(pieces), WIDE=wide, BLOCK=_BLOCK_BYTES[wide], num_warps=8)
    return table


@triton.jit(do_not_specialize=["num_pieces"])
def _copy_kernel(table, num_pieces, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the pieces [num_pieces, 3] of a table, each program every num_programs-th of them.

    WIDE: addresses and sizes are multiples of 16 bytes. BLOCK: bytes that a program has under way at once.
    """
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        source, target = tl.load(table + 3 * piece), tl.load(table + 3 * piece + 1)
        num_bytes = tl.load(table + 3 * piece + 2).to(tl.int32)
        if WIDE:
            words = tl.multiple_of(num_bytes, 16) // 8
            ours = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
            theirs = tl.multiple_of(target.to(tl.pointer_type(tl.int64)), 16)
            for first in range(0, words, BLOCK // 8):
                at = first + tl.arange(0, BLOCK // 8)
                here = at < tl.multiple_of(words, 2)
                tl.store(theirs + at, tl.load(ours + at, mask=here), mask=here)
        else:
            bare = source.to(tl.pointer_type(tl.uint8))
            other = target.to(tl.pointer_type(tl.uint8))
            for first in range(0, num_bytes, BLOCK):
                at = first + tl.arange(0, BLOCK)
                tl.store(other + at, tl.load(bare + at, mask=at < num_bytes), mask=at < num_bytes)
