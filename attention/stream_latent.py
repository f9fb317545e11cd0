"""Partial attention over latents for Hopper: each streams through shared memory once, as K and as V of all heads.

As in ``stream_kv``, one warp of a program asks for tiles of latents, before the queries exist where the tokens are old
enough, and runs ahead over the ends of pieces. A tile is multiplied twice, the second time transposed, and each product
has warps of its own, so that one tile's weights are made while those of the tile before are used:

    weighs    S^T = [values | turned] q^T of tile i + 1,  softmax      notes: by what earlier sums decay,
    sums      O^T += values^T P^T of tile i                            after a piece's last tile what they sum to

Tokens are the tensor core's 64 rows, rows x heads its columns. Where there are 64 of these, they are its rows, and two
groups of warps share the elements of values: a softmax then needs no word between warps, and products read less.
More heads than MAX_COLUMNS are taken in passes that run beside each other: a tile that one reads from memory, the other
finds in the cache.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel.device import capability, early

from .online_softmax import LOG2_E
from .page_tiles import (
    BLOCK_SIZES,
    ELEMENTS,
    FETCH_REGISTERS,
    PIECE,
    SWIZZLE_BYTES,
    early_turns,
    fetch_tile,
)
from .pages import Pages
from .partial import Partials
from .rows import Rows, Work
from .sum_latents import sum_heads, sum_up
from .weigh_latents import NOTES, weigh, weigh_heads
from .work import Cutting

TILE = 64  # tokens of a turn
MAX_COLUMNS = 64  # rows x heads of a program
VALUE_DIM, TURNED_DIM = 512, 64
STAGES = 2
PERSISTENT_TILES = 16  # of one run at most where programs take spans: verification, not prompts
WARPS = {8: (1, 80, 120), 16: (1, 80, 120), 32: (1, 112, 184), 64: (2, 128, 168)}
"""By columns: groups of warps that sum, a thread's registers at the launch, and those of one that sums; one that weighs
gets most of what is left."""


@gluon.jit
def _fetch(
    latents, values, turned, full, free, page_table, pieces, first_piece, last_piece, table_stride,
    BLOCK_SIZE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warp that asks for the tile of each turn once its stage is free."""
    STAGES: gl.constexpr = full.shape[0]
    TILE: gl.constexpr = values.shape[1]
    VALUE: gl.constexpr = values.shape[2]
    BYTES: gl.constexpr = TILE * (VALUE + turned.shape[2]) * latents.dtype.primitive_bitwidth // 8
    its = pieces + first_piece * PIECE
    begin, end, settled = gl.load(its + 2), gl.load(its + 3), gl.load(its + 5)
    early = early_turns(begin, end, settled, gl.cdiv(end - begin, TILE), TILE, STAGES)
    turn = first_piece * 0
    for piece in range(first_piece, last_piece):
        its = pieces + piece * PIECE
        begin, end = gl.load(its + 2), gl.load(its + 3)
        table = page_table + gl.load(its + 6).to(gl.int64) * table_stride
        for at in range(begin, end, TILE):
            stage = turn % STAGES
            bar = full.index(stage)
            if (turn == early) & PDL:
                gdc_wait()
            mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            fetch_tile(latents, values, bar, stage, at, end - 1, 0, table, BLOCK_SIZE, BLOCK_SIZE)
            fetch_tile(latents, turned, bar, stage, at, end - 1, 0, table, BLOCK_SIZE, BLOCK_SIZE, VALUE)
            turn += 1


@gluon.jit
def _stream_latent_kernel(
    latents, q, page_table, visible_len, pieces, span_start, part_start, out, lse,
    q_row_stride, table_stride, scale_log2, num_heads,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, GROUPS: gl.constexpr, M: gl.constexpr, TILE: gl.constexpr,
    VALUE: gl.constexpr, TURNED: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, SUM_REGISTERS: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = latents.dtype
    program, first_head = gl.program_id(0), gl.program_id(1) * HEADS
    # the step's work was uploaded before its first layer
    first_piece, last_piece = gl.load(span_start + program), gl.load(span_start + program + 1)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TURNED], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TURNED], dtype)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, VALUE], layout)
    turned = gl.allocate_shared_memory(dtype, [STAGES, TILE, TURNED], layout)
    q_values = gl.allocate_shared_memory(dtype, [M, VALUE], q_layout)
    q_turned = gl.allocate_shared_memory(dtype, [M, TURNED], q_layout)
    notes = gl.allocate_shared_memory(gl.float32, [NOTES, M], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    said = gl.allocate_shared_memory(gl.int64, [NOTES, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [NOTES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=GROUPS)
    for s in gl.static_range(NOTES):
        mbarrier.init(said.index(s), count=1)
        mbarrier.init(heard.index(s), count=GROUPS)
    if first_piece < last_piece:
        if GROUPS == 1:
            gl.warp_specialize(
                [
                    (weigh, (
                        q, values, turned, q_values, q_turned, notes, full, said, heard, pieces, first_piece,
                        last_piece, visible_len, part_start, lse, q_row_stride, scale_log2, num_heads, first_head,
                        q, notes, page_table, table_stride, table_stride, HEADS, BLOCK_SIZE, False, SPLIT, PDL,
                    )),
                    (sum_up, (
                        values, turned, notes, free, said, heard, pieces, first_piece, last_piece, part_start, out,
                        num_heads, first_head, 0, GROUPS, HEADS, M, False, SPLIT, PDL,
                    )),
                    (_fetch, (
                        latents, values, turned, full, free, page_table, pieces, first_piece, last_piece, table_stride,
                        BLOCK_SIZE, PDL,
                    )),
                ],
                [4, 1],
                [SUM_REGISTERS, FETCH_REGISTERS],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (weigh_heads, (
                        q, values, turned, q_values, q_turned, notes, full, said, heard, pieces, first_piece,
                        last_piece, visible_len, part_start, lse, q_row_stride, scale_log2, num_heads, first_head,
                        q, notes, page_table, table_stride, table_stride, HEADS, BLOCK_SIZE, False, SPLIT, PDL,
                    )),
                    (sum_heads, (
                        values, turned, notes, free, said, heard, pieces, first_piece, last_piece, part_start, out,
                        num_heads, first_head, 0, GROUPS, HEADS, M, False, SPLIT, PDL,
                    )),
                    (sum_heads, (
                        values, turned, notes, free, said, heard, pieces, first_piece, last_piece, part_start, out,
                        num_heads, first_head, 1, GROUPS, HEADS, M, False, SPLIT, PDL,
                    )),
                    (_fetch, (
                        latents, values, turned, full, free, page_table, pieces, first_piece, last_piece, table_stride,
                        BLOCK_SIZE, PDL,
                    )),
                ],
                [4, 4, 1],
                [SUM_REGISTERS, SUM_REGISTERS, FETCH_REGISTERS],
            )  # fmt: skip
    elif PDL:
        gdc_wait()  # a kernel that ends without waiting would let the next one pass the one before


def supports(pages: Pages, value_dim: int) -> bool:
    """Return whether the kernel can read these pages [P, 1, 1, block_size, D], whose first elements are values."""
    return (
        isinstance(pages, torch.Tensor)
        and capability(pages.device)[0] == 9
        and pages.dtype in ELEMENTS
        and pages.is_contiguous()
        and pages.shape[3] in BLOCK_SIZES
        and (value_dim, pages.shape[4] - value_dim) == (VALUE_DIM, TURNED_DIM)
    )


def cutting(num_heads: int, max_rows: int, processors: int) -> Cutting:
    """Return how steps of runs of so many rows are cut."""
    passes = passes_of(num_heads)
    tile_rows = min(max_rows, MAX_COLUMNS // -(-num_heads // passes))
    persistent = max_rows <= PERSISTENT_TILES * tile_rows
    return Cutting("stream_latent", tile_rows, TILE, max(1, processors // passes), persistent)


def passes_of(num_heads: int) -> int:
    """Return in how many passes the heads of a rank are taken."""
    return -(-num_heads // MAX_COLUMNS)


def _boxes_of(pages: torch.Tensor) -> TensorDescriptor:
    """Describe pages as rows of D, in boxes of one page, as wide as the swizzle, and of one tile at most."""
    flat = pages.view(-1, pages.shape[-1])
    block = [min(TILE, pages.shape[3]), SWIZZLE_BYTES // pages.element_size()]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[pages.dtype])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), block, layout)


def attend(
    q_RQD: torch.Tensor, pages: torch.Tensor, rows: Rows, work: Work, partials: Partials, scale: float, *, pdl: bool
) -> None:
    """Attend rows to the latents of the local shard; see ``PartialAttention``. Partials are written."""
    num_heads, passes = q_RQD.shape[1], passes_of(q_RQD.shape[1])
    heads = -(-num_heads // passes)
    columns = max(8, triton.next_power_of_2(work.cutting.tile_rows * heads))
    groups, registers, sum_registers = WARPS[columns]
    _stream_latent_kernel[(work.programs, passes)](
        _boxes_of(pages), q_RQD, rows.page_table, rows.visible_len, work.pieces, work.span_start,
        work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), rows.page_table.stride(0), scale * LOG2_E, num_heads,
        HEADS=heads, BLOCK_SIZE=pages.shape[3], GROUPS=groups, M=columns, TILE=TILE,
        VALUE=VALUE_DIM, TURNED=TURNED_DIM, SPLIT=work.part_start is not None, STAGES=STAGES,
        SUM_REGISTERS=sum_registers, FETCH_REGISTERS=FETCH_REGISTERS, num_warps=4, maxnreg=registers, **early(pdl),
    )  # fmt: skip
