"""Partial attention of few rows for Hopper: K and V stream through shared memory, asked for before the queries exist.

Decode and verification read a whole shard for a handful of rows, so all that counts is that memory never rests. One
warp of a program asks for tiles of K and V, and four attend. What is cached does not depend on the step, except for the
tokens that it appends: that warp asks for every tile that the stages hold before it waits for the kernel that makes the
queries (programmatic dependent launch), and for tiles that may hold new tokens after.

A program takes a span of the step's work list (``work``), and the warp that asks runs ahead over the ends of pieces:

    asks      a0 a1 a2 | wait for queries | a3 a4 b0 b1 ...        stages hold the next turns, whosever they are
    attends              wait for queries | a0 a1 a2 a3 a4, store a | b0 b1 ..., store b

Each stage has two barriers, and a phase of them is one turn: ``full`` completes when its bytes have come, and the warps
that attend wait; ``free`` when they are done with it, and the warp that asks waits, but for a first turn.

Tokens are the tensor core's 64 rows; the query heads of one KV head, times the rows of a sequence, are its columns:
S^T = K q^T, O^T = V^T P^T.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel.device import early

from .online_softmax import LOG2_E, divisor, natural_lse
from .page_tiles import FETCH_REGISTERS, PIECE, boxes_of, cell_of, early_turns, exp2, fetch_tile, is_readable, keep_seen
from .partial import Partials
from .rows import Rows, Work

TILE = 64  # tokens
WIDEST_OF_TWO_TILES = 128  # a turn takes two tiles of heads up to this size, else one, so that stages stay several
MAX_COLUMNS = 64
MAX_COLUMN_ELEMENTS = 64 * 128  # columns x head size: more sums than that do not fit the registers
STAGE_BYTES = 196608
# A thread's at the launch: half of a processor's, or 5/8 of them for the most columns, so that kernels that launch
# dependently find room beside it. Those that attend then take most of what the launch has.
REGISTERS, REGISTERS_OF_MOST_COLUMNS = 128, 160


@gluon.jit
def fetch_turns(
    kv, tiles, full, free, page_table, pieces, first_piece, last_piece, table_stride, k_row, v_row, page_rows,
    BLOCK_SIZE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warp that asks for the tiles of each turn, one or two of K and of V, once their stage is free."""
    STAGES: gl.constexpr = full.shape[0]
    TILE: gl.constexpr = tiles.shape[1]
    TILES: gl.constexpr = tiles.shape[0] // (2 * STAGES)
    TURN: gl.constexpr = TILES * TILE
    BYTES: gl.constexpr = 2 * TURN * tiles.shape[2] * kv.dtype.primitive_bitwidth // 8
    its = pieces + first_piece * PIECE
    begin, end, settled = gl.load(its + 2), gl.load(its + 3), gl.load(its + 5)
    early = early_turns(begin, end, settled, gl.cdiv(end - begin, TURN), TURN, STAGES)
    turn = first_piece * 0
    for piece in range(first_piece, last_piece):
        its = pieces + piece * PIECE
        begin, end = gl.load(its + 2), gl.load(its + 3)
        table = page_table + gl.load(its + 6).to(gl.int64) * table_stride
        for at in range(begin, end, TURN):
            stage = turn % STAGES
            bar = full.index(stage)
            if (turn == early) & PDL:
                gdc_wait()
            mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            for tile in gl.static_range(TILES):
                token, to = at + tile * TILE, stage * 2 * TILES + tile
                fetch_tile(kv, tiles, bar, to, token, end - 1, k_row, table, page_rows, BLOCK_SIZE)
                fetch_tile(kv, tiles, bar, to + TILES, token, end - 1, v_row, table, page_rows, BLOCK_SIZE)
            turn += 1


@gluon.jit
def _attend(
    q, tiles_s, q_s, p_s, full, free, pieces, first_piece, last_piece, visible_len, visible_from, part_start, out, lse,
    q_row_stride, scale_log2, num_heads, kv_head,
    GROUP: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that attend, turn by turn, and store the partial of each piece."""
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = full.shape[0]
    TILE: gl.constexpr = tiles_s.shape[1]
    TILES: gl.constexpr = tiles_s.shape[0] // (2 * STAGES)
    D: gl.constexpr = tiles_s.shape[2]
    M: gl.constexpr = q_s.shape[0]
    dtype: gl.constexpr = tiles_s.dtype
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    columns: gl.constexpr = gl.SliceLayout(0, wgmma)
    c = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, lines))
    m = gl.arange(0, M, layout=columns)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(1, wgmma))
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, wgmma))
    nothing = gl.zeros([TILE, M], gl.float32, layout=wgmma)
    q_t = q_s.permute((1, 0))
    turn = first_piece * 0
    for piece in range(first_piece, last_piece):
        # loaded here and not carried from one piece to the next: Triton before 3.8 forgets that a carried value is the
        # bound of an inner loop (ForOpDeadArgElimination), and every piece would begin where the first one does
        its = pieces + piece * PIECE
        first, stop, begin, end = gl.load(its), gl.load(its + 1), gl.load(its + 2), gl.load(its + 3)
        q_row = (first + c // GROUP).to(gl.int64)
        from_q = q + (q_row * q_row_stride + (kv_head * GROUP + c % GROUP) * D)[:, None] + d[None, :]
        q_s.store(gl.load(from_q, mask=(q_row < stop)[:, None], other=0.0))
        fence_async_shared()
        row = (first + m // GROUP).to(gl.int64)
        real = row < stop
        limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
        if WINDOW:
            least = gl.load(visible_from + row, mask=real, other=0)
        # asked for here, so that what is stored in the end does not wait for it
        cell = cell_of(part_start, row, gl.load(its + 4), real, SPLIT).to(gl.int64)
        top = gl.full([M], float("-inf"), gl.float32, layout=columns)
        total = gl.zeros([TILE, M], gl.float32, layout=wgmma)
        acc = gl.zeros([D, M], gl.float32, layout=wgmma)
        for at in range(begin, end, TILES * TILE):
            stage = turn % STAGES
            k0, v0 = tiles_s.index(stage * 2 * TILES), tiles_s.index(stage * 2 * TILES + TILES)
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            s0 = warpgroup_mma(k0, q_t, nothing, use_acc=False, is_async=True)
            if TILES == 2:
                k1, v1 = tiles_s.index(stage * 4 + 1), tiles_s.index(stage * 4 + 3)
                s1 = warpgroup_mma(k1, q_t, nothing, use_acc=False, is_async=True)
                s0, s1 = warpgroup_mma_wait(num_outstanding=0, deps=[s0, s1])
            else:
                s0 = warpgroup_mma_wait(num_outstanding=0, deps=[s0])
            s0 = gl.where((at + token)[:, None] < limit[None, :], s0 * scale_log2, float("-inf"))
            if WINDOW:
                s0 = gl.where((at + token)[:, None] >= least[None, :], s0, float("-inf"))
            highest = s0
            if TILES == 2:
                s1 = gl.where((at + TILE + token)[:, None] < limit[None, :], s1 * scale_log2, float("-inf"))
                if WINDOW:
                    s1 = gl.where((at + TILE + token)[:, None] >= least[None, :], s1, float("-inf"))
                highest = gl.maximum(s0, s1)
            new_top = gl.maximum(top, gl.max(highest, 0))
            shift = gl.where(new_top == float("-inf"), 0.0, new_top)
            decay = exp2(top - shift)
            p0 = exp2(s0 - shift[None, :])
            p_s.index(0).permute((1, 0)).store(p0.to(dtype))
            if at + TILES * TILE > end:
                keep_seen(v0, at, end, lines)
            if TILES == 2:
                p1 = exp2(s1 - shift[None, :])
                p_s.index(1).permute((1, 0)).store(p1.to(dtype))
                if at + TILES * TILE > end:
                    keep_seen(v1, at + TILE, end, lines)
                p0 += p1
            total = total * decay[None, :] + p0
            fence_async_shared()
            acc = acc * decay[None, :]
            acc = warpgroup_mma(v0.permute((1, 0)), p_s.index(0).permute((1, 0)), acc, is_async=True)
            if TILES == 2:
                acc = warpgroup_mma(v1.permute((1, 0)), p_s.index(1).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            top = new_top
            turn += 1

        sums = gl.sum(total, 0)
        cell = cell * num_heads + kv_head * GROUP + m % GROUP
        gl.store(lse + cell, natural_lse(top, sums), mask=real)
        value = acc / divisor(sums)[None, :]
        gl.store(out + cell[None, :] * D + o_d[:, None], value.to(out.dtype.element_ty), mask=real[None, :])


@gluon.jit
def _stream_kv_kernel(
    kv, q, page_table, visible_len, visible_from, pieces, span_start, part_start, out, lse,
    q_row_stride, table_stride, scale_log2, num_heads, num_kv_heads,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr, M: gl.constexpr, TILE: gl.constexpr,
    TILES: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = kv.dtype
    program, kv_head = gl.program_id(0), gl.program_id(1)
    # the step's work was uploaded before its first layer
    first_piece, last_piece = gl.load(span_start + program), gl.load(span_start + program + 1)
    page_rows = 2 * num_kv_heads * BLOCK_SIZE
    k_row, v_row = kv_head * BLOCK_SIZE, (num_kv_heads + kv_head) * BLOCK_SIZE
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], dtype)
    tiles_s = gl.allocate_shared_memory(dtype, [STAGES * 2 * TILES, TILE, D], layout)
    q_s = gl.allocate_shared_memory(dtype, [M, D], layout)
    p_s = gl.allocate_shared_memory(dtype, [TILES, M, TILE], p_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=1)
    if first_piece < last_piece:
        gl.warp_specialize(
            [
                (_attend, (
                    q, tiles_s, q_s, p_s, full, free, pieces, first_piece, last_piece, visible_len, visible_from,
                    part_start, out, lse, q_row_stride, scale_log2, num_heads, kv_head, GROUP, WINDOW, SPLIT, PDL,
                )),
                (fetch_turns, (
                    kv, tiles_s, full, free, page_table, pieces, first_piece, last_piece, table_stride, k_row, v_row,
                    page_rows, BLOCK_SIZE, PDL,
                )),
            ],
            [1],
            [FETCH_REGISTERS],
        )  # fmt: skip
    elif PDL:
        gdc_wait()  # a kernel that ends without waiting would let the next one pass the one before


def supports(pages: torch.Tensor, columns: int) -> bool:
    """Return whether the kernel can read these pages, for so many rows x heads that read one KV head together."""
    return is_readable(pages) and columns <= min(MAX_COLUMNS, MAX_COLUMN_ELEMENTS // pages.shape[4])


def attend(
    q_RQD: torch.Tensor, pages: torch.Tensor, rows: Rows, work: Work, partials: Partials, scale: float, *, pdl: bool
) -> None:
    """Attend the few rows of each sequence to the local shard; see ``PartialAttention``. Partials are written."""
    _, num_heads, head_dim = q_RQD.shape
    num_kv_heads, block_size = pages.shape[2], pages.shape[3]
    group = num_heads // num_kv_heads
    columns = max(8, triton.next_power_of_2(work.cutting.tile_rows * group))
    tiles = 2 if head_dim <= WIDEST_OF_TWO_TILES else 1
    _stream_kv_kernel[(work.programs, num_kv_heads)](
        boxes_of(pages, TILE), q_RQD, rows.page_table, rows.visible_len, rows.seen_from, work.pieces, work.span_start,
        work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), rows.page_table.stride(0), scale * LOG2_E, num_heads, num_kv_heads,
        GROUP=group, D=head_dim, BLOCK_SIZE=block_size, M=columns, TILE=TILE, TILES=tiles,
        WINDOW=rows.visible_from is not None, SPLIT=work.part_start is not None,
        STAGES=STAGE_BYTES // (2 * tiles * TILE * head_dim * pages.element_size()),
        FETCH_REGISTERS=FETCH_REGISTERS, num_warps=4,
        maxnreg=REGISTERS if columns < MAX_COLUMNS else REGISTERS_OF_MOST_COLUMNS, **early(pdl),
    )  # fmt: skip
