"""Partial attention over latents of 8 bits by few heads, for Hopper: bytes are widened in registers alone.

As in ``stream_eight_bits``, whose steps these are, both products take their left operand from registers, two programs
share a processor, and each of them waits for itself. A latent is key and value: its bytes are read twice, as rows for
S^T = K q^T and across for O^T = V^T P^T, each time by one half or a quarter of its elements. Its scale multiplies its
scores, before those of its turned part, which keeps 16 bits, are added, and as a logarithm is part of its weight.
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
from .page_tiles import FETCH_REGISTERS, PIECE, cell_of, exp2
from .pages import QuantizedPages
from .partial import Partials
from .rows import Rows, Work
from .stream_eight_bits import LOWEST, MOST, halves, inverse, log2, neighbours, power, sum_of_threads
from .stream_latent import TURNED_DIM, VALUE_DIM
from .stream_latent_eight_bits import boxes_of, fetch
from .weigh_latents import pages_of, scales_of
from .work import Cutting

KERNEL = "stream_latent_bytes"
MAX_COLUMNS = 16  # rows x heads
TURN = 64  # tokens
PROGRAMS = 2  # a processor
STAGES = 2
REGISTERS = 128  # a thread's at the launch


@gluon.jit
def _store(where, even, odd, FIRST: gl.constexpr, WIDTH: gl.constexpr, HEADS: gl.constexpr, SPLIT: gl.constexpr):
    """Store elements of each column's values from FIRST on, of which two products [pairs, M] made every second one.

    A thread has some of many columns: they go through shared memory, so that what is stored is whole lines.
    """
    out, room, part_start, first, stop, part, num_heads = where
    M: gl.constexpr = even.shape[1]
    NUMBER: gl.constexpr = 2 * even.shape[0]
    lines: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    lines_s = room._reinterpret(gl.float32, [M, NUMBER], gl.SwizzledSharedLayout(16, 2, 4, order=[1, 0]))
    lines_s.store(gl.join(even, odd).permute((1, 0, 2)).reshape([M, NUMBER]))
    column = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
    row, head = first + column // HEADS, column % HEADS
    real = (row < stop) & (head < num_heads)
    cell = cell_of(part_start, row, part, real, SPLIT)
    to = out + ((cell * num_heads + head).to(gl.int64) * WIDTH + FIRST)[:, None]
    d = gl.arange(0, NUMBER, layout=gl.SliceLayout(0, lines))
    gl.store(to + d[None, :], lines_s.load(lines).to(out.dtype.element_ty), mask=real[:, None])


@gluon.jit
def _attend(
    q, scales, page_table, bytes_s, turned_s, q_s, q_turned, p_s, full, free, pieces, first_piece, last_piece,
    visible_len, part_start, out, lse, q_row_stride, table_stride, scale_stride, scale_log2, num_heads,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that attend, turn by turn, and store the partial of each piece."""
    STAGES: gl.constexpr = full.shape[0]
    TURN: gl.constexpr = bytes_s.shape[1]
    VALUE: gl.constexpr = bytes_s.shape[2]
    TURNED: gl.constexpr = turned_s.shape[2]
    M: gl.constexpr = q_turned.shape[0]
    QUARTER: gl.constexpr = VALUE // 8  # in pairs of bytes
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wgmma, 2)
    columns: gl.constexpr = gl.SliceLayout(0, wgmma)
    its_rows: gl.constexpr = gl.SliceLayout(1, wgmma)
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // TURNED, TURNED // 8], [4, 1], [1, 0])
    long: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    halves_layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    pairs_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows_s = bytes_s._reinterpret(gl.uint16, [STAGES * 4, TURN, QUARTER], pairs_layout)
    across_s = bytes_s._reinterpret(gl.uint16, [STAGES * 2, TURN, 2 * QUARTER], pairs_layout)
    q0_s = q_s._reinterpret(gl.float16, [2, M, VALUE // 2], q_s.layout)
    m = gl.arange(0, M, layout=columns)
    token = gl.arange(0, TURN, layout=its_rows)
    seen_token = gl.arange(0, TURN, layout=gl.SliceLayout(0, operand))
    nothing = gl.zeros([TURN, M], gl.float32, layout=wgmma)
    turn = first_piece * 0
    for piece in range(first_piece, last_piece):
        # loaded here and not carried from one piece to the next: see ``stream_kv``
        its = pieces + piece * PIECE
        first, stop, begin, end = gl.load(its), gl.load(its + 1), gl.load(its + 2), gl.load(its + 3)
        table = page_table + gl.load(its + 6).to(gl.int64) * table_stride
        page = pages_of(table, begin + token, end, BLOCK_SIZE)
        row, head = first + m // HEADS, m % HEADS
        real = (row < stop) & (head < num_heads)
        limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
        whole = gl.minimum(gl.load(visible_len + first), end)
        if PDL:  # what is above was uploaded before the step's first layer
            gdc_wait()
        c = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
        d = gl.arange(0, TURNED, layout=gl.SliceLayout(0, lines))
        q_row, q_head = first + c // HEADS, c % HEADS
        from_q = q + (q_row.to(gl.int64) * q_row_stride + q_head * (VALUE + TURNED) + VALUE)[:, None] + d[None, :]
        q_end = gl.load(from_q, mask=((q_row < stop) & (q_head < num_heads))[:, None], other=0.0)
        c = gl.arange(0, M, layout=gl.SliceLayout(1, long))
        d = gl.arange(0, VALUE, layout=gl.SliceLayout(0, long))
        q_row, q_head = first + c // HEADS, c % HEADS
        from_q = q + (q_row.to(gl.int64) * q_row_stride + q_head * (VALUE + TURNED))[:, None] + d[None, :]
        value = gl.load(from_q, mask=((q_row < stop) & (q_head < num_heads))[:, None], other=0.0).to(gl.float32)
        q_turned.store(q_end)
        token_scale = scales_of(page, scales, begin + token, end, scale_stride, BLOCK_SIZE)
        page = pages_of(table, begin + TURN + token, end, BLOCK_SIZE)
        up, down = power(gl.max(gl.abs(value)))
        factor = down * scale_log2
        value = (value * up).to(gl.float16).reshape([M, VALUE // 4, 2, 2]).permute((0, 1, 3, 2))
        q0, q1 = gl.split(value)  # elements 4 i and 4 i + 1, and those two further
        q0_s.index(0).store(gl.convert_layout(q0.reshape([M, VALUE // 2]), halves_layout))
        q0_s.index(1).store(gl.convert_layout(q1.reshape([M, VALUE // 2]), halves_layout))
        fence_async_shared()
        shift = gl.full([M], LOWEST, gl.float32, layout=columns)
        total = sum_of_threads(nothing)
        a0 = gl.zeros([2 * QUARTER, M], gl.float32, layout=wgmma)
        a1 = gl.zeros([2 * QUARTER, M], gl.float32, layout=wgmma)
        b0 = gl.zeros([2 * QUARTER, M], gl.float32, layout=wgmma)
        b1 = gl.zeros([2 * QUARTER, M], gl.float32, layout=wgmma)
        for at in range(begin, end, TURN):
            stage = turn % STAGES
            # asked for a turn early, and their pages two: an address that waits for a load would hold up the turn
            next_scale = scales_of(page, scales, at + TURN + token, end, scale_stride, BLOCK_SIZE)
            page = pages_of(table, at + 2 * TURN + token, end, BLOCK_SIZE)
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            t = warpgroup_mma(turned_s.index(stage), q_turned.permute((1, 0)), nothing, use_acc=False, is_async=True)
            k0, k1 = neighbours(rows_s.index(stage * 4).load(operand))
            s = warpgroup_mma(k0, q_s.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
            u = warpgroup_mma(k1, q_s.index(4).permute((1, 0)), nothing, use_acc=False, is_async=True)
            for quarter in gl.static_range(1, 4):  # two sums: products of one wait for each other
                was0, was1 = k0, k1
                k0, k1 = neighbours(rows_s.index(stage * 4 + quarter).load(operand))
                s = warpgroup_mma(k0, q_s.index(quarter).permute((1, 0)), s, is_async=True)
                u = warpgroup_mma(k1, q_s.index(4 + quarter).permute((1, 0)), u, is_async=True)
                was0, was1 = warpgroup_mma_wait(num_outstanding=2, deps=[was0, was1])
            s, u, t, k0, k1 = warpgroup_mma_wait(num_outstanding=0, deps=[s, u, t, k0, k1])
            token_scale = gl.where(at + token < end, gl.maximum(token_scale, 8.077935669463161e-28), 1.0)  # 2 ** -90
            v = across_s.index(stage * 2).permute((1, 0)).load(operand)
            if at + TURN > end:
                v = gl.where((at + seen_token < end)[None, :], v, 0)
            v0, v1 = halves(v)
            s = (s + u) * (token_scale * factor)[:, None] + t * scale_log2 + log2(token_scale)[:, None]
            if at + TURN > whole:
                s = gl.where((at + token)[:, None] < limit[None, :], s, float("-inf"))
            x = s - shift[None, :]
            if gl.max(x) > MOST:
                new_shift = gl.maximum(shift, gl.max(s, 0) - MOST / 2)
                decay = exp2(shift - new_shift)
                a0, a1, b0, b1 = a0 * decay[None, :], a1 * decay[None, :], b0 * decay[None, :], b1 * decay[None, :]
                total *= gl.convert_layout(decay, gl.SliceLayout(0, total.type.layout), assert_trivial=True)[None, :]
                shift = new_shift
                x = s - shift[None, :]
            p = exp2(x)
            p_s.permute((1, 0)).store(p.to(p_s.dtype))
            fence_async_shared()
            a0 = warpgroup_mma(v0, p_s.permute((1, 0)), a0, is_async=True)
            a1 = warpgroup_mma(v1, p_s.permute((1, 0)), a1, is_async=True)
            total += sum_of_threads(p * inverse(token_scale)[:, None])
            v = across_s.index(stage * 2 + 1).permute((1, 0)).load(operand)
            if at + TURN > end:
                v = gl.where((at + seen_token < end)[None, :], v, 0)
            mbarrier.arrive(free.index(stage), count=1)
            a0, a1, v0, v1 = warpgroup_mma_wait(num_outstanding=0, deps=[a0, a1, v0, v1])
            v0, v1 = halves(v)
            b0 = warpgroup_mma(v0, p_s.permute((1, 0)), b0, is_async=True)
            b1 = warpgroup_mma(v1, p_s.permute((1, 0)), b1, is_async=True)
            b0, b1, v0, v1 = warpgroup_mma_wait(num_outstanding=0, deps=[b0, b1, v0, v1])
            token_scale = next_scale
            turn += 1

        sums = gl.convert_layout(gl.sum(total, 0), columns, assert_trivial=True)
        cell = (cell_of(part_start, row, gl.load(its + 4), real, SPLIT) * num_heads + head).to(gl.int64)
        gl.store(lse + cell, natural_lse(shift, sums), mask=real)
        where = out, q_s, part_start, first, stop, gl.load(its + 4), num_heads
        share = 1.0 / divisor(sums)[None, :]
        _store(where, a0 * share, a1 * share, 0, VALUE, HEADS, SPLIT)
        _store(where, b0 * share, b1 * share, VALUE // 2, VALUE, HEADS, SPLIT)


@gluon.jit
def _stream_latent_bytes_kernel(
    bytes_, turned_boxes, q, scales, page_table, visible_len, pieces, span_start, part_start, out, lse,
    q_row_stride, table_stride, scale_stride, scale_log2, num_heads,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, M: gl.constexpr, TURN: gl.constexpr, VALUE: gl.constexpr,
    TURNED: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = q.dtype.element_ty
    program = gl.program_id(0)
    # the step's work was uploaded before its first layer
    first_piece, last_piece = gl.load(span_start + program), gl.load(span_start + program + 1)
    byte_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TURN, VALUE // 4], gl.uint8)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TURN, TURNED], dtype)
    bytes_s = gl.allocate_shared_memory(gl.uint8, [STAGES, TURN, VALUE], byte_layout)
    turned_s = gl.allocate_shared_memory(dtype, [STAGES, TURN, TURNED], layout)
    half_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, VALUE // 8], gl.float16)
    q_s = gl.allocate_shared_memory(gl.float16, [8, M, VALUE // 8], half_layout)
    turned_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TURNED], dtype)
    q_turned = gl.allocate_shared_memory(dtype, [M, TURNED], turned_layout)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TURN], gl.float16)
    p_s = gl.allocate_shared_memory(gl.float16, [M, TURN], p_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=1)
    if first_piece < last_piece:
        gl.warp_specialize(
            [
                (_attend, (
                    q, scales, page_table, bytes_s, turned_s, q_s, q_turned, p_s, full, free, pieces, first_piece,
                    last_piece, visible_len, part_start, out, lse, q_row_stride, table_stride, scale_stride, scale_log2,
                    num_heads, HEADS, BLOCK_SIZE, SPLIT, PDL,
                )),
                (fetch, (
                    bytes_, turned_boxes, bytes_s, turned_s, full, free, page_table, pieces, first_piece, last_piece,
                    table_stride, TURN, BLOCK_SIZE, PDL,
                )),
            ],
            [1],
            [FETCH_REGISTERS],
        )  # fmt: skip
    elif PDL:
        gdc_wait()  # a kernel that ends without waiting would let the next one pass the one before


def cutting(max_rows: int, processors: int) -> Cutting:
    """Return how steps of runs of so many rows are cut."""
    return Cutting(KERNEL, max_rows, TURN, PROGRAMS * processors)


def attend(
    q_RQD: torch.Tensor, pages: QuantizedPages, rows: Rows, work: Work, partials: Partials, scale: float, *, pdl: bool
) -> None:
    """Attend few rows x heads of each sequence to the local shard; see ``PartialAttention``. Partials are written."""
    assert pages.turned is not None
    heads = q_RQD.shape[1]
    columns = max(8, triton.next_power_of_2(work.cutting.tile_rows * heads))
    _stream_latent_bytes_kernel[(work.programs,)](
        boxes_of(pages.bytes, gl.uint8, TURN), boxes_of(pages.turned, gl.bfloat16, TURN), q_RQD, pages.scales,
        rows.page_table, rows.visible_len, work.pieces, work.span_start,
        work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), rows.page_table.stride(0), pages.scales.stride(0), scale * LOG2_E, heads,
        HEADS=heads, BLOCK_SIZE=pages.shape[3], M=columns, TURN=TURN, VALUE=VALUE_DIM, TURNED=TURNED_DIM,
        SPLIT=work.part_start is not None, STAGES=STAGES, FETCH_REGISTERS=FETCH_REGISTERS, num_warps=4,
        maxnreg=REGISTERS, **early(pdl),
    )  # fmt: skip
