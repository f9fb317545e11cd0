"""Partial attention over latents of 8 bits for Hopper: little more than half the bytes of ``stream_latent``.

Its roles are those of ``stream_latent``, and one more, between the warp that asks for tiles and those that weigh: four
warps that widen what comes to 16 bits, words as they lie, and the order undone where queries are read and results
stored. Bytes come in parts of a tile, so that memory is busy although tiles of 16 bits, of
which there are two as there, leave little room. With the most columns it is the queries that take it, and a tile has
fewer tokens.

A token's scale comes by a plain load a turn early, to the warps that weigh: it multiplies the scores of its values,
before those of its turned part, which keeps 16 bits, are added, and its weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel.device import capability, early

from .online_softmax import LOG2_E
from .page_tiles import BLOCK_SIZES, FETCH_REGISTERS, PIECE, early_turns
from .pages import QuantizedPages
from .partial import Partials
from .rows import Rows, Work
from .stream_latent import STAGES, TURNED_DIM, VALUE_DIM, passes_of
from .stream_latent import cutting as wide_cutting
from .sum_latents import sum_heads, sum_up
from .weigh_latents import NOTES, weigh, weigh_heads
from .work import Cutting

KERNEL = "stream_latent_eight_bits"
PART = 32  # tokens of a copy
STRIP = 128  # elements of values that are widened at once: as wide as the swizzle
WIDE = {32: (64, 2), 64: (32, 4)}
"""By columns, more than ``stream_latent_bytes`` takes: tokens of a tile, and parts on their way."""
WARPS = {32: (1, 112, 168, 64), 64: (2, 96, 160, 56)}
"""By columns: groups of warps that sum, a thread's registers at the launch, of one that sums, and of one that widens;
one that weighs gets most of what is left."""


@gluon.jit
def _widen_bytes(byte):
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
def _fetch_boxes(pages, tiles, bar, part, token, last, table, BLOCK_SIZE: gl.constexpr):
    """Ask for the boxes of a part that begins at ``token``; past the last token its own box comes again."""
    BOX: gl.constexpr = pages.block_shape[1]
    WIDTH: gl.constexpr = pages.block_shape[2]
    BOXES: gl.constexpr = tiles.shape[1] // BOX
    PIECES: gl.constexpr = tiles.shape[2] // WIDTH
    boxes = tiles._reinterpret(pages.dtype, [tiles.shape[0] * PIECES * BOXES, 1, BOX, WIDTH], pages.layout)
    for box in gl.static_range(BOXES):
        at = gl.minimum(token + box * BOX, last)
        page = gl.load(table + at // BLOCK_SIZE)
        for piece in gl.static_range(PIECES):
            to = boxes.index((part * PIECES + piece) * BOXES + box)
            tma.async_copy_global_to_shared(pages, [page, at % BLOCK_SIZE // BOX * BOX, piece * WIDTH], bar, to)


@gluon.jit
def fetch(
    bytes_, turned, bytes_s, turned_s, landed, taken, page_table, pieces, first_piece, last_piece, table_stride,
    TILE: gl.constexpr, BLOCK_SIZE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warp that asks for the parts of each turn once there is room."""
    PARTS: gl.constexpr = landed.shape[0]
    PART: gl.constexpr = bytes_s.shape[1]
    BYTES: gl.constexpr = PART * (bytes_s.shape[2] + turned_s.shape[2] * 2)
    its = pieces + first_piece * PIECE
    begin, end, settled = gl.load(its + 2), gl.load(its + 3), gl.load(its + 5)
    early = early_turns(begin, end, settled, gl.cdiv(end - begin, TILE) * (TILE // PART), PART, PARTS)
    turn = first_piece * 0
    for piece in range(first_piece, last_piece):
        its = pieces + piece * PIECE
        begin, end = gl.load(its + 2), gl.load(its + 3)
        table = page_table + gl.load(its + 6).to(gl.int64) * table_stride
        stop = begin + gl.cdiv(end - begin, TILE) * TILE
        for at in range(begin, stop, PART):
            part = turn % PARTS
            bar = landed.index(part)
            if (turn == early) & PDL:
                gdc_wait()
            mbarrier.wait(taken.index(part), ((turn // PARTS) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            _fetch_boxes(bytes_, bytes_s, bar, part, at, end - 1, table, BLOCK_SIZE)
            _fetch_boxes(turned, turned_s, bar, part, at, end - 1, table, BLOCK_SIZE)
            turn += 1


@gluon.jit
def _widen(
    bytes_s, part_turned, values, turned, landed, taken, full, free, pieces, first_piece, last_piece,
    STRIP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that make tiles of 16 bits of what comes."""
    if PDL:
        gdc_wait()
    PARTS: gl.constexpr = landed.shape[0]
    STAGES: gl.constexpr = full.shape[0]
    PART: gl.constexpr = bytes_s.shape[1]
    TILE: gl.constexpr = values.shape[1]
    VALUE: gl.constexpr = values.shape[2]
    TURNED: gl.constexpr = turned.shape[2]
    dtype: gl.constexpr = values.dtype
    STRIPS: gl.constexpr = VALUE // STRIP
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // STRIP, STRIP // 8], [4, 1], [1, 0])
    short: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // TURNED, TURNED // 8], [4, 1], [1, 0])
    strips_s = bytes_s._reinterpret(gl.uint8, [PARTS * STRIPS, PART, STRIP], bytes_s.layout)
    strips = values._reinterpret(dtype, [STAGES * STRIPS, TILE, STRIP], turned.layout)
    turn = first_piece * 0
    tile = first_piece * 0
    for piece in range(first_piece, last_piece):
        its = pieces + piece * PIECE
        begin, end = gl.load(its + 2), gl.load(its + 3)
        for _ in range(begin, end, TILE):
            stage = tile % STAGES
            mbarrier.wait(free.index(stage), ((tile // STAGES) & 1) ^ 1)
            for number in gl.static_range(TILE // PART):
                part = turn % PARTS
                mbarrier.wait(landed.index(part), (turn // PARTS) & 1)
                for strip in gl.static_range(STRIPS):
                    byte = strips_s.index(part * STRIPS + strip).load(lines)
                    wide = strips.index(stage * STRIPS + strip).slice(number * PART, PART, dim=0)
                    wide.store(_widen_bytes(byte))
                own = part_turned.index(part).load(short)
                turned.index(stage).slice(number * PART, PART, dim=0).store(own)
                mbarrier.arrive(taken.index(part), count=1)
                turn += 1
            fence_async_shared()
            mbarrier.arrive(full.index(stage), count=1)
            tile += 1


@gluon.jit
def _stream_latent_eight_bits_kernel(
    bytes_, turned_boxes, q, scales, page_table, visible_len, pieces, span_start, part_start, out, lse,
    q_row_stride, table_stride, scale_stride, scale_log2, num_heads,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, GROUPS: gl.constexpr, M: gl.constexpr, TILE: gl.constexpr,
    VALUE: gl.constexpr, TURNED: gl.constexpr, PART: gl.constexpr, STRIP: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, SUM_REGISTERS: gl.constexpr, WIDEN_REGISTERS: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = q.dtype.element_ty
    program, first_head = gl.program_id(0), gl.program_id(1) * HEADS
    # the step's work was uploaded before its first layer
    first_piece, last_piece = gl.load(span_start + program), gl.load(span_start + program + 1)
    byte_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PART, STRIP], gl.uint8)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, TURNED], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TURNED], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    bytes_s = gl.allocate_shared_memory(gl.uint8, [PARTS, PART, VALUE], byte_layout)
    part_turned = gl.allocate_shared_memory(dtype, [PARTS, PART, TURNED], layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, VALUE], layout)
    turned = gl.allocate_shared_memory(dtype, [STAGES, TILE, TURNED], layout)
    q_values = gl.allocate_shared_memory(dtype, [M, VALUE], q_layout)
    q_turned = gl.allocate_shared_memory(dtype, [M, TURNED], q_layout)
    notes = gl.allocate_shared_memory(gl.float32, [NOTES, M], plain)
    scale_s = gl.allocate_shared_memory(gl.float32, [TILE], plain)
    landed = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    said = gl.allocate_shared_memory(gl.int64, [NOTES, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [NOTES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(PARTS):
        mbarrier.init(landed.index(s), count=1)
        mbarrier.init(taken.index(s), count=1)
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
                        scales, scale_s, page_table, table_stride, scale_stride, HEADS, BLOCK_SIZE, True, SPLIT, PDL,
                    )),
                    (sum_up, (
                        values, turned, notes, free, said, heard, pieces, first_piece, last_piece, part_start, out,
                        num_heads, first_head, 0, GROUPS, HEADS, M, True, SPLIT, PDL,
                    )),
                    (_widen, (
                        bytes_s, part_turned, values, turned, landed, taken, full, free, pieces, first_piece,
                        last_piece, STRIP, PDL,
                    )),
                    (fetch, (
                        bytes_, turned_boxes, bytes_s, part_turned, landed, taken, page_table, pieces, first_piece,
                        last_piece, table_stride, TILE, BLOCK_SIZE, PDL,
                    )),
                ],
                [4, 4, 1],
                [SUM_REGISTERS, WIDEN_REGISTERS, FETCH_REGISTERS],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (weigh_heads, (
                        q, values, turned, q_values, q_turned, notes, full, said, heard, pieces, first_piece,
                        last_piece, visible_len, part_start, lse, q_row_stride, scale_log2, num_heads, first_head,
                        scales, scale_s, page_table, table_stride, scale_stride, HEADS, BLOCK_SIZE, True, SPLIT, PDL,
                    )),
                    (sum_heads, (
                        values, turned, notes, free, said, heard, pieces, first_piece, last_piece, part_start, out,
                        num_heads, first_head, 0, GROUPS, HEADS, M, True, SPLIT, PDL,
                    )),
                    (sum_heads, (
                        values, turned, notes, free, said, heard, pieces, first_piece, last_piece, part_start, out,
                        num_heads, first_head, 1, GROUPS, HEADS, M, True, SPLIT, PDL,
                    )),
                    (_widen, (
                        bytes_s, part_turned, values, turned, landed, taken, full, free, pieces, first_piece,
                        last_piece, STRIP, PDL,
                    )),
                    (fetch, (
                        bytes_, turned_boxes, bytes_s, part_turned, landed, taken, page_table, pieces, first_piece,
                        last_piece, table_stride, TILE, BLOCK_SIZE, PDL,
                    )),
                ],
                [4, 4, 4, 1],
                [SUM_REGISTERS, SUM_REGISTERS, WIDEN_REGISTERS, FETCH_REGISTERS],
            )  # fmt: skip
    elif PDL:
        gdc_wait()  # a kernel that ends without waiting would let the next one pass the one before


def supports(pages: QuantizedPages, value_dim: int) -> bool:
    """Return whether the kernel can read these pages of latents, whose values have so many elements."""
    return (
        capability(pages.device)[0] == 9
        and pages.dtype == torch.bfloat16
        and pages.turned is not None
        and pages.shape[3] in BLOCK_SIZES
        and (value_dim, pages.turned.shape[4]) == (VALUE_DIM, TURNED_DIM)
    )


def cutting(num_heads: int, max_rows: int, processors: int) -> Cutting:
    """Return how steps of runs of so many rows are cut."""
    return replace(wide_cutting(num_heads, max_rows, processors), kernel=KERNEL)


def boxes_of(plane: torch.Tensor, element: gl.dtype, tokens: int = PART) -> TensorDescriptor:
    """Describe a plane [P, 1, 1, block_size, width] in boxes of one page, 128 bytes wide, of so many tokens at most."""
    num_pages, _, _, block_size, width = plane.shape
    rows = plane.as_strided((num_pages, block_size, width), (plane.stride(0), width, 1))
    block = [1, min(tokens, block_size), 128 // plane.element_size()]
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block, layout)


def attend(
    q_RQD: torch.Tensor, pages: QuantizedPages, rows: Rows, work: Work, partials: Partials, scale: float, *, pdl: bool
) -> None:
    """Attend rows to the latents of the local shard; see ``PartialAttention``. Partials are written."""
    assert pages.turned is not None
    num_heads, passes = q_RQD.shape[1], passes_of(q_RQD.shape[1])
    heads = -(-num_heads // passes)
    columns = triton.next_power_of_2(work.cutting.tile_rows * heads)
    (tile, parts), (groups, registers, sum_registers, widen_registers) = WIDE[columns], WARPS[columns]
    _stream_latent_eight_bits_kernel[(work.programs, passes)](
        boxes_of(pages.bytes, gl.uint8), boxes_of(pages.turned, gl.bfloat16), q_RQD, pages.scales, rows.page_table,
        rows.visible_len, work.pieces, work.span_start,
        work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), rows.page_table.stride(0), pages.scales.stride(0), scale * LOG2_E, num_heads,
        HEADS=heads, BLOCK_SIZE=pages.shape[3], GROUPS=groups, M=columns, TILE=tile, VALUE=VALUE_DIM,
        TURNED=TURNED_DIM, PART=PART, STRIP=STRIP, SPLIT=work.part_start is not None, STAGES=STAGES, PARTS=parts,
        SUM_REGISTERS=sum_registers, WIDEN_REGISTERS=widen_registers, FETCH_REGISTERS=FETCH_REGISTERS,
        num_warps=4, maxnreg=registers, **early(pdl),
    )  # fmt: skip
