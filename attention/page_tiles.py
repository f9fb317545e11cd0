"""Pages as tiles of shared memory: what the two kernels for Hopper share.

The tensor memory engine copies boxes, and a box lies in one page: where pages have fewer tokens than a tile, a tile is
several boxes. One warp of a program asks for all of them, so that those that attend never wait for an address.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from parallel.device import capability

from .work import PIECE_FIELDS

BLOCK_SIZES = (16, 32, 64, 128, 256)
HEAD_DIMS = (64, 128, 256)
SWIZZLE_BYTES = 128
FETCH_REGISTERS = 24  # a thread that asks for tiles
PIECE = gl.constexpr(len(PIECE_FIELDS))
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def cell_of(part_start, row, part, real, SPLIT: gl.constexpr):
    """Return which partials rows write; rows that are not ``real`` write none."""
    if SPLIT:
        return gl.load(part_start + row, mask=real, other=0) + part
    else:
        return row


def is_readable(pages: torch.Tensor) -> bool:
    """Return whether these pages [P, 2, K, block_size, D] can be read in boxes on their device."""
    return (
        capability(pages.device)[0] == 9
        and pages.dtype in ELEMENTS
        and pages.is_contiguous()
        and pages.shape[3] in BLOCK_SIZES
        and pages.shape[4] in HEAD_DIMS
    )


def boxes_of(pages: torch.Tensor, tile: int) -> TensorDescriptor:
    """Describe pages as rows of D, in boxes of one page: whole tiles of ``tile`` tokens, or parts of one."""
    flat, (block_size, head_dim) = pages.view(-1, pages.shape[-1]), pages.shape[3:]
    block = [tile, head_dim] if block_size >= tile else [block_size, SWIZZLE_BYTES // pages.element_size()]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[pages.dtype])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), block, layout)


@gluon.jit
def fetch_tile(
    kv, tiles, bar, tile, token, last, row0, table, page_rows, BLOCK_SIZE: gl.constexpr, COLUMN: gl.constexpr = 0
):
    """Ask for the tile that begins at ``token``, box by box; past the last token its own box comes again.

    A tile stands in shared memory in pieces as wide as its swizzle. A box that is no whole tile comes in such pieces,
    and the pieces of a tile's boxes are neighbours. Call it from one warp: every copy takes a barrier of its callers.
    """
    BOX: gl.constexpr = kv.block_shape[0]
    WIDTH: gl.constexpr = kv.block_shape[1]
    BOXES: gl.constexpr = tiles.shape[1] // BOX
    PIECES: gl.constexpr = tiles.shape[2] // WIDTH
    boxes = tiles._reinterpret(kv.dtype, [tiles.shape[0] * PIECES * BOXES, BOX, WIDTH], kv.layout)
    for box in gl.static_range(BOXES):
        at = gl.minimum(token + box * BOX, last)
        row = gl.load(table + at // BLOCK_SIZE) * page_rows + row0 + (at % BLOCK_SIZE) // BOX * BOX
        for piece in gl.static_range(PIECES):
            to = boxes.index((tile * PIECES + piece) * BOXES + box)
            tma.async_copy_global_to_shared(kv, [row, COLUMN + piece * WIDTH], bar, to)


@gluon.jit
def early_turns(begin, end, settled, count, TURN: gl.constexpr, STAGES: gl.constexpr):
    """Return how many turns of TURN tokens can be asked for at once and hold tokens before ``settled`` alone.

    These do not depend on the step: what a kernel asks for before it waits for the kernel that makes its queries.
    """
    return gl.minimum(STAGES, count if end <= settled else gl.maximum(settled - begin, 0) // TURN)


@gluon.jit
def keep_seen(tile, token, end, layout: gl.constexpr):
    """Zero the rows of a tile of V that stand past the end: 0 x what lies there might be NaN."""
    t = token + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    value = tile.load(layout)
    tile.store(gl.where((t < end)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def exp2(x):
    """Return 2 ** x [float32] by one instruction; results below 2 ** -126 are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
