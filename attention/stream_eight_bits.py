"""Partial attention of few rows over pages of 8 bits for Hopper: half the bytes of ``stream_kv``, widened on the way.

As there, a program takes a span of the step's work list, one warp asks for tiles of K and V, and four attend:
S^T = K q^T, O^T = V^T P^T. Both K and V are left operands, and those may come from registers, so a byte is read from
shared memory once and widened there. All products are of float16, which holds every e4m3 exactly and which one
instruction makes of two; queries are multiplied by a power of two that brings them into its range.

How four bytes of a thread become operands without moving any, where 16 bits that are loaded are a pair of bytes:

    K   a word is d0 d1 d2 d3 of one token: two operands, d0 d1 and d2 d3. The products of each are one with every
        second pair of the query's elements, so queries are read in that order
    V   loaded across, a word is d0 d1 of one token and of the next: after one permutation two operands again, of the
        even elements of a head and of the odd ones, two results that are stored in turn

A token's scales come with its tile. K's multiplies its scores. V's is part of the weight, as its logarithm is added to
the score: weights are then at most a bound that float16 holds, whatever the scales are, and the sum that they are
divided by takes them without. Weights are at most 2 ** 15: what is subtracted from scores follows their maximum when
one exceeds that, which is seldom, and is otherwise left as it is.

A turn of 64 tokens is some 260 instructions a warp. Two programs a processor, each waiting for itself, hide what a turn
waits for: memory takes 1,750 cycles for the 128 tokens of both, their instructions 520 to issue.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel.device import capability, early

from .online_softmax import LOG2_E, divisor, natural_lse
from .page_tiles import BLOCK_SIZES, FETCH_REGISTERS, PIECE, cell_of, early_turns, exp2
from .pages import SIXTEEN_BITS, QuantizedPages
from .partial import Partials
from .rows import Rows, Work

HEAD_DIM = 128
MAX_COLUMNS = 64
TURN = 64  # tokens
WARPS = 4
PROGRAMS = 2  # a processor
STAGES, STAGES_OF_MANY_COLUMNS = 6, 5
REGISTERS, REGISTERS_OF_MOST_COLUMNS = 96, 128  # a thread's at the launch
LOWEST = gl.constexpr(-1e30)  # below every score, and finite
MOST = gl.constexpr(15.0)  # log2 of the largest weight


@gluon.jit
def neighbours(pairs):
    """Return in float16 what every second pair of bytes means as e4m3, and what the others mean."""
    return gl.inline_asm_elementwise(
        """
        { .reg .b16 a, b;
          mov.b32 {a, b}, $2;
          cvt.rn.f16x2.e4m3x2 $0, a;
          cvt.rn.f16x2.e4m3x2 $1, b; }
        """,
        "=&r,=r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def halves(pairs):
    """Return in float16 what the first bytes of pairs mean as e4m3, and what the second bytes mean."""
    return gl.inline_asm_elementwise(
        """
        { .reg .b16 a, b;
          .reg .b32 c;
          prmt.b32 c, $2, $2, 0x3120;
          mov.b32 {a, b}, c;
          cvt.rn.f16x2.e4m3x2 $0, a;
          cvt.rn.f16x2.e4m3x2 $1, b; }
        """,
        "=&r,=r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def log2(x):
    """Return log2 of normal float32 values by one instruction."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def inverse(x):
    """Return 1 / x of normal float32 values by one instruction."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def power(largest):
    """Return the power of two that brings a float32 value to [2 ** 14, 2 ** 15), and its inverse."""
    exponent = gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 20)
    return ((268 - exponent) << 23).to(gl.float32, bitcast=True), ((exponent - 14) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _scales_of(scales_s, tile, TURN: gl.constexpr, BLOCK_SIZE: gl.constexpr, layout: gl.constexpr):
    """Return the scales of a tile's tokens."""
    if BLOCK_SIZE >= 32:
        tiles = scales_s._reinterpret(
            gl.float32, [scales_s.shape[0] * scales_s.shape[2] // TURN, TURN], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        return tiles.index(tile).load(layout)
    else:  # a box of 16 is followed by a gap as long
        spread: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 8]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0]], [], [TURN // 16, 16]
        )
        tiles = scales_s._reinterpret(
            gl.float32, [scales_s.shape[0] * 16 // TURN, TURN // 16, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
        return gl.convert_layout(tiles.index(tile).slice(0, 16, dim=1).load(spread).reshape([TURN]), layout)


@gluon.jit
def sum_of_threads(x):
    """Return the sums of a product's rows [R, M] that stand in one thread: [32, M]."""
    M: gl.constexpr = x.shape[1]
    x = gl.sum(x.reshape([x.shape[0] // 64, 4, 2, 8, M]), 2)
    return gl.sum(x, 0).reshape([32, M])


@gluon.jit
def _fetch(
    kv, scales, tiles, scales_s, full, free, page_table, pieces, first_piece, last_piece, table_stride, kv_head,
    num_kv_heads, page_rows, BLOCK_SIZE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warp that asks for the tiles of each turn and their scales, once their stage is free."""
    STAGES: gl.constexpr = full.shape[0]
    TURN: gl.constexpr = tiles.shape[1]
    D: gl.constexpr = tiles.shape[2]
    BOX: gl.constexpr = kv.block_shape[0]
    BOXES: gl.constexpr = TURN // BOX
    BYTES: gl.constexpr = 2 * TURN * (D + 4)
    boxes = tiles._reinterpret(kv.dtype, [tiles.shape[0] * BOXES, BOX, D], kv.layout)
    APART: gl.constexpr = scales_s.shape[2] // BOX
    scale_boxes = scales_s._reinterpret(gl.float32, [scales_s.shape[0] * APART, 1, BOX], scales.layout)
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
            for box in gl.static_range(BOXES):
                token = gl.minimum(at + box * BOX, end - 1)
                page = gl.load(table + token // BLOCK_SIZE)
                column = kv_head * BLOCK_SIZE + token % BLOCK_SIZE // BOX * BOX
                v_column = column + num_kv_heads * BLOCK_SIZE
                row = page * page_rows
                k_to, v_to = 2 * stage * BOXES + box, (2 * stage + 1) * BOXES + box
                tma.async_copy_global_to_shared(scales, [page, column], bar, scale_boxes.index(k_to * APART))
                tma.async_copy_global_to_shared(scales, [page, v_column], bar, scale_boxes.index(v_to * APART))
                tma.async_copy_global_to_shared(kv, [row + column, 0], bar, boxes.index(k_to))
                tma.async_copy_global_to_shared(kv, [row + v_column, 0], bar, boxes.index(v_to))
            turn += 1


@gluon.jit
def _attend(
    q, tiles_s, scales_s, q_s, p_s, full, free, pieces, first_piece, last_piece, visible_len,
    part_start, out, lse, q_row_stride, scale_log2, num_heads, kv_head,
    GROUP: gl.constexpr, BLOCK_SIZE: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that attend, turn by turn, and store the partial of each piece."""
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = full.shape[0]
    TURN: gl.constexpr = tiles_s.shape[1]
    D: gl.constexpr = tiles_s.shape[2]
    HALF: gl.constexpr = D // 2
    M: gl.constexpr = q_s.shape[1]
    lines: gl.constexpr = gl.BlockedLayout([1, 4], [32 * 4 // HALF, HALF // 4], [4, 1], [1, 0])
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wgmma, 2)
    columns: gl.constexpr = gl.SliceLayout(0, wgmma)
    its_rows: gl.constexpr = gl.SliceLayout(1, wgmma)
    pairs_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    pairs_s = tiles_s._reinterpret(gl.uint16, [2 * STAGES, TURN, HALF], pairs_layout)
    c = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
    d = gl.arange(0, HALF, layout=gl.SliceLayout(0, lines))
    d0 = 2 * (d & -2) + (d & 1)  # of the first product; the second takes what is two elements further
    m = gl.arange(0, M, layout=columns)
    token = gl.arange(0, TURN, layout=its_rows)
    seen_token = gl.arange(0, TURN, layout=gl.SliceLayout(0, operand))
    nothing = gl.zeros([TURN, M], gl.float32, layout=wgmma)
    q0_t, q1_t = q_s.index(0).permute((1, 0)), q_s.index(1).permute((1, 0))
    turn = first_piece * 0
    for piece in range(first_piece, last_piece):
        # loaded here and not carried from one piece to the next: see ``stream_kv``
        its = pieces + piece * PIECE
        first, stop, begin, end = gl.load(its), gl.load(its + 1), gl.load(its + 2), gl.load(its + 3)
        q_row = (first + c // GROUP).to(gl.int64)
        from_q = q + (q_row * q_row_stride + (kv_head * GROUP + c % GROUP) * D)[:, None] + d0[None, :]
        q0 = gl.load(from_q, mask=(q_row < stop)[:, None], other=0.0).to(gl.float32)
        q1 = gl.load(from_q + 2, mask=(q_row < stop)[:, None], other=0.0).to(gl.float32)
        up, down = power(gl.max(gl.maximum(gl.abs(q0), gl.abs(q1))))
        factor = down * scale_log2
        q_s.index(0).store((q0 * up).to(q_s.dtype))
        q_s.index(1).store((q1 * up).to(q_s.dtype))
        fence_async_shared()
        row = (first + m // GROUP).to(gl.int64)
        real = row < stop
        limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
        whole = gl.minimum(gl.load(visible_len + first), end)
        cell = cell_of(part_start, row, gl.load(its + 4), real, SPLIT).to(gl.int64)
        shift = gl.full([M], LOWEST, gl.float32, layout=columns)
        total = sum_of_threads(nothing)
        acc0 = gl.zeros([HALF, M], gl.float32, layout=wgmma)
        acc1 = gl.zeros([HALF, M], gl.float32, layout=wgmma)
        for at in range(begin, end, TURN):
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            k = pairs_s.index(2 * stage).load(operand)
            k0, k1 = neighbours(k)
            s = warpgroup_mma(k0, q0_t, nothing, use_acc=False, is_async=True)
            s = warpgroup_mma(k1, q1_t, s, is_async=True)
            k_scale = _scales_of(scales_s, 2 * stage, TURN, BLOCK_SIZE, its_rows)
            v_scale = _scales_of(scales_s, 2 * stage + 1, TURN, BLOCK_SIZE, its_rows)
            v = pairs_s.index(2 * stage + 1).permute((1, 0)).load(operand)
            if at + TURN > end:
                v_scale = gl.where(at + token < end, v_scale, 1.0)
                v = gl.where((at + seen_token < end)[None, :], v, 0)
            v_scale = gl.maximum(v_scale, 8.077935669463161e-28)  # 2 ** -90: sums of inverses are finite
            v_log, v_inverse = log2(v_scale), inverse(v_scale)
            v0, v1 = halves(v)
            s, k0, k1 = warpgroup_mma_wait(num_outstanding=0, deps=[s, k0, k1])
            s = s * (k_scale * factor)[:, None] + v_log[:, None]
            if at + TURN > whole:
                s = gl.where((at + token)[:, None] < limit[None, :], s, float("-inf"))
            x = s - shift[None, :]
            if gl.max(x) > MOST:
                new_shift = gl.maximum(shift, gl.max(s, 0) - MOST / 2)
                decay = exp2(shift - new_shift)
                acc0, acc1 = acc0 * decay[None, :], acc1 * decay[None, :]
                total *= gl.convert_layout(decay, gl.SliceLayout(0, total.type.layout), assert_trivial=True)[None, :]
                shift = new_shift
                x = s - shift[None, :]
            p = exp2(x)
            p_s.permute((1, 0)).store(p.to(p_s.dtype))
            fence_async_shared()
            mbarrier.arrive(free.index(stage), count=1)
            acc0 = warpgroup_mma(v0, p_s.permute((1, 0)), acc0, is_async=True)
            acc1 = warpgroup_mma(v1, p_s.permute((1, 0)), acc1, is_async=True)
            total += sum_of_threads(p * v_inverse[:, None])
            acc0, acc1, v0, v1 = warpgroup_mma_wait(num_outstanding=0, deps=[acc0, acc1, v0, v1])
            turn += 1

        sums = gl.convert_layout(gl.sum(total, 0), columns, assert_trivial=True)
        cell = cell * num_heads + kv_head * GROUP + m % GROUP
        gl.store(lse + cell, natural_lse(shift, sums), mask=real)
        value = gl.join(acc0 / divisor(sums)[None, :], acc1 / divisor(sums)[None, :])
        OUT: gl.constexpr = value.type.layout
        pair = gl.arange(0, HALF, layout=gl.SliceLayout(1, gl.SliceLayout(2, OUT)))
        odd = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, OUT)))
        cell = gl.convert_layout(cell, gl.SliceLayout(0, gl.SliceLayout(2, OUT)))
        here = gl.convert_layout(real.to(gl.int32), gl.SliceLayout(0, gl.SliceLayout(2, OUT))) > 0
        to = out + cell[None, :, None] * D + 2 * pair[:, None, None] + odd[None, None, :]
        gl.store(to, value.to(out.dtype.element_ty), mask=here[None, :, None])


@gluon.jit
def _stream_eight_bits_kernel(
    kv, scales, q, page_table, visible_len, pieces, span_start, part_start, out, lse,
    q_row_stride, table_stride, page_rows, scale_log2, num_heads, num_kv_heads,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr, M: gl.constexpr, TURN: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    program, kv_head = gl.program_id(0), gl.program_id(1)
    # the step's work was uploaded before its first layer
    first_piece, last_piece = gl.load(span_start + program), gl.load(span_start + program + 1)
    bytes_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TURN, D], gl.uint8)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D // 2], gl.float16)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TURN], gl.float16)
    tiles_s = gl.allocate_shared_memory(gl.uint8, [STAGES * 2, TURN, D], bytes_layout)
    BOX: gl.constexpr = kv.block_shape[0]
    APART: gl.constexpr = max(BOX, 32)  # floats from one box to the next: a copy ends at a multiple of 128 bytes
    scales_s = gl.allocate_shared_memory(gl.float32, [STAGES * 2 * (TURN // BOX), 1, APART], scales.layout)
    q_s = gl.allocate_shared_memory(gl.float16, [2, M, D // 2], q_layout)
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
                    q, tiles_s, scales_s, q_s, p_s, full, free, pieces, first_piece, last_piece, visible_len,
                    part_start, out, lse, q_row_stride, scale_log2, num_heads, kv_head, GROUP, BLOCK_SIZE, SPLIT, PDL,
                )),
                (_fetch, (
                    kv, scales, tiles_s, scales_s, full, free, page_table, pieces, first_piece, last_piece,
                    table_stride, kv_head, num_kv_heads, page_rows, BLOCK_SIZE, PDL,
                )),
            ],
            [1],
            [FETCH_REGISTERS],
        )  # fmt: skip
    elif PDL:
        gdc_wait()  # a kernel that ends without waiting would let the next one pass the one before


def supports(pages: QuantizedPages, columns: int) -> bool:
    """Return whether the kernel can read these pages, for so many rows x heads that read one KV head together."""
    return (
        capability(pages.device)[0] == 9
        and pages.dtype in SIXTEEN_BITS
        and pages.turned is None
        and pages.shape[3] in BLOCK_SIZES
        and pages.shape[4] == HEAD_DIM
        and columns <= MAX_COLUMNS
    )


def boxes_of(pages: QuantizedPages, turn: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Describe pages of bytes as rows of D, and their scales as a row a page, in boxes of one page."""
    num_pages, _, _, block_size, head_dim = pages.values.shape
    rows = num_pages * pages.values.stride(0) // head_dim
    flat = pages.bytes.as_strided((rows, head_dim), (head_dim, 1))
    box = min(turn, block_size)
    values = TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), [box, head_dim],
        gl.NVMMASharedLayout.get_default_for([box, head_dim], gl.uint8),
    )  # fmt: skip
    flat = pages.scales.flatten(1)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return values, TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, box], layout)


def attend(
    q_RQD: torch.Tensor, pages: QuantizedPages, rows: Rows, work: Work, partials: Partials, scale: float, *, pdl: bool
) -> None:
    """Attend the few rows of each sequence to the local shard; see ``PartialAttention``. Partials are written."""
    num_heads, head_dim = q_RQD.shape[1:]
    num_kv_heads, block_size = pages.shape[2], pages.shape[3]
    group = num_heads // num_kv_heads
    columns = max(8, triton.next_power_of_2(work.cutting.tile_rows * group))
    values, scales = boxes_of(pages, TURN)
    _stream_eight_bits_kernel[(work.programs, num_kv_heads)](
        values, scales, q_RQD, rows.page_table, rows.visible_len, work.pieces, work.span_start,
        work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), rows.page_table.stride(0), pages.values.stride(0) // head_dim,
        scale * LOG2_E, num_heads, num_kv_heads,
        GROUP=group, D=head_dim, BLOCK_SIZE=block_size, M=columns, TURN=TURN, SPLIT=work.part_start is not None,
        STAGES=STAGES if columns <= 16 else STAGES_OF_MANY_COLUMNS, FETCH_REGISTERS=FETCH_REGISTERS,
        num_warps=WARPS, maxnreg=REGISTERS if columns < MAX_COLUMNS else REGISTERS_OF_MOST_COLUMNS, **early(pdl),
    )  # fmt: skip
