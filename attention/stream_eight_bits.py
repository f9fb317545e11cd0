"""Partial attention of few rows over pages of 8 bits for Hopper: half the bytes of ``stream_kv``, widened on the way.

As there, a program takes a span of the step's work list, one warp asks for tiles of K and V, and the queries keep their
16 bits. What is different lies between shared memory and the tensor cores: eight warps attend, 128 tokens a turn, since
widening is the most of their work. K becomes the left operand of S^T = K q^T in registers; V goes through a tile of 16
bits in shared memory, as O^T = V^T P^T reads it across.

A turn of a KV head of 128 elements is 32 KiB, for which memory takes 1,750 of a processor's cycles (4.3 TB/s over 132
processors). Widening is 7 instructions for 4 elements, of 450 in all a warp and turn: 900 cycles to issue. Shared
memory is busy in about 1,000 (32 KiB written, 32 read, 32 of V written wide, 32 read by the tensor cores; 128 bytes a
cycle). The rest is what waits for each other. Widening words as they lie, and undoing the order where queries are read
and results stored, halved the instructions of a first version and took a quarter of its time.

A token's scales come by plain loads a turn early: K's multiplies its scores, V's its weights.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel.device import capability

from .page_tiles import BLOCK_SIZES, FETCH_REGISTERS, PIECE, exp2, keep_seen
from .pages import QuantizedPages
from .partial import Partials
from .rows import Rows, Work
from .stream_kv import LOG2_E, fetch_turns

TILE = 64  # tokens of a copy; a turn takes two of K and two of V
TURN = gl.constexpr(2 * TILE)
UNIT = 2 * TILE
HEAD_DIM = 128
MAX_COLUMNS = 64
WARPS = 8
STAGES = 4
REGISTERS, REGISTERS_OF_MOST_COLUMNS = 128, 160  # a thread's at the launch


@gluon.jit
def _widen(byte):
    """Return in bfloat16 what bytes mean as e4m3, times 2 ** -120; of every four, the two in the middle change places.

    Sign and magnitude move to where a bfloat16 has them: seven instructions for four elements. NaN becomes 480.
    """
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 a, b, c;
          shl.b32 a, $2, 4;
          shl.b32 b, $2, 8;
          shr.u32 c, $2, 4;
          and.b32 a, a, 0x07f007f0;
          and.b32 c, c, 0x07f007f0;
          lop3.b32 $0, b, 0x80008000, a, 0xEA;
          lop3.b32 $1, $2, 0x80008000, c, 0xEA; }
        """,
        "=&r,=&r,r", [byte], dtype=gl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _pages_of(table, token, end, BLOCK_SIZE: gl.constexpr):
    return gl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)


@gluon.jit
def _scales_of(page, scales, token, end, scale_stride, v_scales, BLOCK_SIZE: gl.constexpr):
    """Return the scales of tokens' keys and values, 0 past the end."""
    its = scales + page.to(gl.int64) * scale_stride + token % BLOCK_SIZE
    return gl.load(its, mask=token < end, other=0.0), gl.load(its + v_scales, mask=token < end, other=0.0)


@gluon.jit
def _attend(
    q, tiles_s, v_s, q_s, p_s, full, free, page_table, scales, pieces, first_piece, last_piece, visible_len,
    part_start, out, lse, q_row_stride, table_stride, scale_stride, v_scales, scale_log2, num_heads, kv_head,
    GROUP: gl.constexpr, BLOCK_SIZE: gl.constexpr, SPLIT: gl.constexpr, WARPS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """The warps that attend, turn by turn, and store the partial of each piece."""
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = full.shape[0]
    D: gl.constexpr = tiles_s.shape[2]
    M: gl.constexpr = q_s.shape[0]
    dtype: gl.constexpr = v_s.dtype
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [WARPS, 1], [1, 0])
    bytes_: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // D, D // 16], [WARPS, 1], [1, 0])
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wgmma, 2)
    of_bytes: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, M, 32]
    )
    byte_operand: gl.constexpr = gl.DotOperandLayout(0, of_bytes, 4)  # a thread's four bytes are one word
    columns: gl.constexpr = gl.SliceLayout(0, wgmma)
    c = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, lines))
    # the element of a head that stands at d where words are taken apart as the products want them
    k_d = (d & -16) | (((d >> 1) & 3) << 2) | ((d & 1) << 1) | ((d >> 3) & 1)
    m = gl.arange(0, M, layout=columns)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(1, wgmma))
    o_d = (o_d & -4) | ((o_d & 1) << 1) | ((o_d >> 1) & 1)
    token = gl.arange(0, TURN, layout=gl.SliceLayout(1, wgmma))
    nothing = gl.zeros([TURN, M], gl.float32, layout=wgmma)
    # two tiles of one kind are neighbours: rows of a turn
    turns_s = tiles_s._reinterpret(tiles_s.dtype, [2 * STAGES, TURN, D], tiles_s.layout)
    q_t = q_s.permute((1, 0))
    turn = first_piece * 0
    for piece in range(first_piece, last_piece):
        # loaded here and not carried from one piece to the next: see ``stream_kv``
        its = pieces + piece * PIECE
        first, stop, begin, end = gl.load(its), gl.load(its + 1), gl.load(its + 2), gl.load(its + 3)
        table = page_table + gl.load(its + 6).to(gl.int64) * table_stride
        page = _pages_of(table, begin + token, end, BLOCK_SIZE)
        k_scale, v_scale = _scales_of(page, scales, begin + token, end, scale_stride, v_scales, BLOCK_SIZE)
        page = _pages_of(table, begin + TURN + token, end, BLOCK_SIZE)
        q_row = (first + c // GROUP).to(gl.int64)
        from_q = q + (q_row * q_row_stride + (kv_head * GROUP + c % GROUP) * D)[:, None] + k_d[None, :]
        queries = gl.load(from_q, mask=(q_row < stop)[:, None], other=0.0).to(gl.float32)
        q_s.store((queries * 1.2676506002282294e30).to(dtype))  # 2 ** 100
        fence_async_shared()
        row = (first + m // GROUP).to(gl.int64)
        real = row < stop
        limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
        cell = row
        if SPLIT:
            cell = (gl.load(part_start + row, mask=real, other=0) + gl.load(its + 4)).to(gl.int64)
        top = gl.full([M], float("-inf"), gl.float32, layout=columns)
        total = gl.zeros([TURN, M], gl.float32, layout=wgmma)
        acc = gl.zeros([D, M], gl.float32, layout=wgmma)
        for at in range(begin, end, TURN):
            stage = turn % STAGES
            # asked for a turn early, and their pages two: an address that waits for a load would hold up the turn
            next_k_scale, next_v_scale = _scales_of(
                page, scales, at + TURN + token, end, scale_stride, v_scales, BLOCK_SIZE
            )
            page = _pages_of(table, at + 2 * TURN + token, end, BLOCK_SIZE)
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            k = _widen(turns_s.index(2 * stage).load(byte_operand))
            k = k.reshape([TURN, D // 16, 4, 2, 2]).permute((0, 1, 3, 2, 4)).reshape([TURN, D])
            s = warpgroup_mma(gl.convert_layout(k, operand), q_t, nothing, use_acc=False, is_async=True)
            v_s.store(_widen(turns_s.index(2 * stage + 1).load(bytes_)))
            mbarrier.arrive(free.index(stage), count=1)  # behind a barrier: every warp has read its bytes
            if at + TURN > end:
                keep_seen(v_s, at, end, lines)
            s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
            s = s * (k_scale * scale_log2)[:, None]
            s = gl.where((at + token)[:, None] < limit[None, :], s, float("-inf"))
            new_top = gl.maximum(top, gl.max(s, 0))
            shift = gl.where(new_top == float("-inf"), 0.0, new_top)
            decay = exp2(top - shift)
            p = exp2(s - shift[None, :])
            total = total * decay[None, :] + p
            p_s.permute((1, 0)).store((p * (v_scale * 1.2676506002282294e30)[:, None]).to(dtype))
            fence_async_shared()
            acc = acc * decay[None, :]
            acc = warpgroup_mma(v_s.permute((1, 0)), p_s.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            top, k_scale, v_scale = new_top, next_k_scale, next_v_scale
            turn += 1

        sums = gl.sum(total, 0)
        empty = sums == 0.0
        sums = gl.where(empty, 1.0, sums)
        cell = cell * num_heads + kv_head * GROUP + m % GROUP
        natural = gl.where(empty, float("-inf"), (top + gl.log2(sums)) / 1.4426950408889634)
        gl.store(lse + cell, natural, mask=real)
        value = acc * 1048576.0 / sums[None, :]
        gl.store(out + cell[None, :] * D + o_d[:, None], value.to(out.dtype.element_ty), mask=real[None, :])


@gluon.jit
def _stream_eight_bits_kernel(
    kv, q, scales, page_table, visible_len, pieces, span_start, part_start, out, lse,
    q_row_stride, table_stride, scale_stride, page_rows, scale_log2, num_heads, num_kv_heads,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_SIZE: gl.constexpr, M: gl.constexpr, TILE: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = q.dtype.element_ty
    program, kv_head = gl.program_id(0), gl.program_id(1)
    # the step's work was uploaded before its first layer
    first_piece, last_piece = gl.load(span_start + program), gl.load(span_start + program + 1)
    k_row, v_row = kv_head * BLOCK_SIZE, (num_kv_heads + kv_head) * BLOCK_SIZE
    bytes_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], gl.uint8)
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * TILE, D], dtype)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, 2 * TILE], dtype)
    tiles_s = gl.allocate_shared_memory(gl.uint8, [STAGES * 4, TILE, D], bytes_layout)
    v_s = gl.allocate_shared_memory(dtype, [2 * TILE, D], wide)
    q_s = gl.allocate_shared_memory(dtype, [M, D], gl.NVMMASharedLayout.get_default_for([M, D], dtype))
    p_s = gl.allocate_shared_memory(dtype, [M, 2 * TILE], p_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=1)
    if first_piece < last_piece:
        gl.warp_specialize(
            [
                (_attend, (
                    q, tiles_s, v_s, q_s, p_s, full, free, page_table, scales + kv_head * BLOCK_SIZE, pieces,
                    first_piece, last_piece, visible_len, part_start, out, lse, q_row_stride, table_stride,
                    scale_stride, num_kv_heads * BLOCK_SIZE, scale_log2, num_heads, kv_head, GROUP, BLOCK_SIZE, SPLIT,
                    WARPS, PDL,
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


def supports(pages: QuantizedPages, columns: int) -> bool:
    """Return whether the kernel can read these pages, for so many rows x heads that read one KV head together."""
    return (
        capability(pages.device)[0] == 9
        and pages.dtype == torch.bfloat16
        and pages.turned is None
        and pages.shape[3] in BLOCK_SIZES
        and pages.shape[4] == HEAD_DIM
        and columns <= MAX_COLUMNS
    )


def boxes_of(pages: QuantizedPages) -> TensorDescriptor:
    """Describe pages of bytes as rows of D, in boxes of one page: whole tiles, or parts of one."""
    num_pages, _, _, block_size, head_dim = pages.values.shape
    rows = num_pages * pages.values.stride(0) // head_dim
    flat = pages.bytes.as_strided((rows, head_dim), (head_dim, 1))
    block = [min(TILE, block_size), head_dim]
    return TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), block, gl.NVMMASharedLayout.get_default_for(block, gl.uint8)
    )


def attend(
    q_RQD: torch.Tensor, pages: QuantizedPages, rows: Rows, work: Work, partials: Partials, scale: float, *, pdl: bool
) -> None:
    """Attend the few rows of each sequence to the local shard; see ``PartialAttention``. Partials are written."""
    num_heads, head_dim = q_RQD.shape[1:]
    num_kv_heads, block_size = pages.shape[2], pages.shape[3]
    group = num_heads // num_kv_heads
    columns = max(8, triton.next_power_of_2(work.cutting.tile_rows * group))
    _stream_eight_bits_kernel[(work.programs, num_kv_heads)](
        boxes_of(pages), q_RQD, pages.scales, rows.page_table, rows.visible_len, work.pieces, work.span_start,
        work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), rows.page_table.stride(0), pages.scales.stride(0), pages.values.stride(0) // head_dim,
        scale * LOG2_E * 2.0**20, num_heads, num_kv_heads,
        GROUP=group, D=head_dim, BLOCK_SIZE=block_size, M=columns, TILE=TILE, SPLIT=work.part_start is not None,
        STAGES=STAGES, WARPS=WARPS, FETCH_REGISTERS=FETCH_REGISTERS, PDL=pdl,
        num_warps=WARPS, maxnreg=REGISTERS if columns < MAX_COLUMNS else REGISTERS_OF_MOST_COLUMNS,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
