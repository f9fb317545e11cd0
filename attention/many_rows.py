"""Partial attention of many rows for Hopper: prefill chunks, at the tensor cores' speed.

A program takes one piece of the step's work list (``work``): a tile of 128 rows x heads of one KV head (the GQA group
is packed into the tile) and a range of tokens, which it streams through shared memory. Its warps have roles: one asks
for tiles of K and V, and two groups of four attend, each with half of the rows. Within a group the products of a turn
overlap the softmax of the next, and as no barrier holds the two groups together, one's products overlap the other's
softmax (FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2). The mask is each row's own ``visible_len``, and
``visible_from`` where there is a window; only tiles of tokens that some row does not see whole are masked.

Barriers; each stage has one of the first four, and a phase of it is one tile:

    k_full, v_full   complete when a tile's bytes have come        both groups wait
    k_free, v_free   complete when both groups are done with it    the warp that asks waits, but for a first tile
    seen             group 0 has cleared the last tile of V past the end, where it has one; group 1 waits, once
"""

from __future__ import annotations

import torch
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
from .page_tiles import (
    ELEMENTS,
    FETCH_REGISTERS,
    PIECE,
    boxes_of,
    cell_of,
    early_turns,
    exp2,
    fetch_tile,
    is_readable,
    keep_seen,
)
from .partial import Partials, Workspace
from .rows import Rows, Work
from .work import Cutting

M = 128  # rows x heads of a program, half of them to each group of warps
STAGES = 2
TILE_TOKENS = 128  # of a turn, half as many where heads have 256 elements
REGISTERS = 240  # a thread that attends


@gluon.jit
def _fetch(
    k, v, turned, k_s, t_s, v_s, k_full, v_full, k_free, v_free, table, begin, end, count, settled, kv_head,
    num_kv_heads, BLOCK_SIZE: gl.constexpr, T: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warp that asks for a tile of K and one of V each turn, once both groups have left their stages."""
    if T:
        _fetch_made(k, v, turned, k_s, t_s, v_s, k_full, v_full, k_free, v_free, table, begin, count, kv_head,
                    BLOCK_SIZE, PDL)  # fmt: skip
    else:
        _fetch_paged(k, k_s, v_s, k_full, v_full, k_free, v_free, table, begin, end, count, settled,
                     kv_head * BLOCK_SIZE, (num_kv_heads + kv_head) * BLOCK_SIZE, 2 * num_kv_heads * BLOCK_SIZE,
                     BLOCK_SIZE, PDL)  # fmt: skip


@gluon.jit
def _fetch_paged(
    kv, k_s, v_s, k_full, v_full, k_free, v_free, table, begin, end, count, settled, k_row, v_row, page_rows,
    BLOCK_SIZE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = k_s.shape[0]
    TILE: gl.constexpr = k_s.shape[1]
    BYTES: gl.constexpr = TILE * k_s.shape[2] * kv.dtype.primitive_bitwidth // 8
    early = early_turns(begin, end, settled, count, TILE, STAGES)
    for i in range(count):
        stage, phase = i % STAGES, (i // STAGES) & 1
        at = begin + i * TILE
        if (i == early) & PDL:
            gdc_wait()
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), BYTES)
        fetch_tile(kv, k_s, k_full.index(stage), stage, at, end - 1, k_row, table, page_rows, BLOCK_SIZE)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), BYTES)
        fetch_tile(kv, v_s, v_full.index(stage), stage, at, end - 1, v_row, table, page_rows, BLOCK_SIZE)


@gluon.jit
def _fetch_made(
    k, v, turned, k_s, t_s, v_s, k_full, v_full, k_free, v_free, table, begin, count, kv_head,
    BLOCK_SIZE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """In a workspace the tokens of a run stand one after the other."""
    STAGES: gl.constexpr = k_s.shape[0]
    TILE: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    W: gl.constexpr = v_s.shape[2]
    BYTES: gl.constexpr = TILE * k.dtype.primitive_bitwidth // 8
    row0 = gl.load(table) * BLOCK_SIZE + begin
    if PDL:
        gdc_wait()
    for i in range(count):
        stage, phase = i % STAGES, (i // STAGES) & 1
        row = row0 + i * TILE
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), BYTES * (D + t_s.shape[2]))
        tma.async_copy_global_to_shared(k, [row, kv_head * D], k_full.index(stage), k_s.index(stage))
        tma.async_copy_global_to_shared(turned, [row, 0], k_full.index(stage), t_s.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), BYTES * W)
        tma.async_copy_global_to_shared(v, [row, kv_head * W], v_full.index(stage), v_s.index(stage))


@gluon.jit
def _scores(q_s, qt_s, k_s, t_s, nothing, T: gl.constexpr):
    """Begin the products of queries and a tile of keys, whose T last elements may stand in a tile of their own."""
    scores = warpgroup_mma(q_s, k_s.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if T:
        scores = warpgroup_mma(qt_s, t_s.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _store_queries(to, q, row, head, stop, row_stride, WIDTH: gl.constexpr, FIRST: gl.constexpr):
    """Keep the elements from FIRST on of queries of WIDTH in shared memory; rows that are not there are zero."""
    D: gl.constexpr = to.shape[1]
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    r = gl.convert_layout(row, gl.SliceLayout(1, lines))
    h = gl.convert_layout(head, gl.SliceLayout(1, lines))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, lines))
    source = q + (r.to(gl.int64) * row_stride + h * WIDTH + FIRST)[:, None] + d[None, :]
    to.store(gl.load(source, mask=(r < stop)[:, None], other=0.0))


@gluon.jit
def _softmax(scores, top, total, token, limit, least, whole, scale_log2, WINDOW: gl.constexpr):
    """Return the weights of a tile of scores, the new maxima and sums, and by what earlier sums decay.

    Rows see tokens from ``least`` to ``limit``, all of them those of ``whole``, two numbers alike.
    """
    masked = token + scores.shape[1] > whole[1]
    if WINDOW:
        masked = masked | (token < whole[0])
    if masked:
        t = token + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(t[None, :] < limit[:, None], scores, float("-inf"))
        if WINDOW:
            scores = gl.where(t[None, :] >= least[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1))
    shift = gl.where(new_top == float("-inf"), 0.0, new_top) * scale_log2
    decay = exp2(top * scale_log2 - shift)
    weights = exp2(scores * scale_log2 - shift[:, None])
    return weights, new_top, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _attend(
    q, q_s, qt_s, k_s, t_s, v_s, k_full, v_full, k_free, v_free, seen, visible_len, visible_from, part_start, out, lse,
    q_row_stride, scale_log2, num_heads, kv_head, part, first, stop, begin, end, count,
    PART: gl.constexpr, GROUP: gl.constexpr, T: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that attend with one half of a program's rows x heads."""
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = k_s.shape[0]
    TILE: gl.constexpr = k_s.shape[1]
    D: gl.constexpr = k_s.shape[2]
    W: gl.constexpr = v_s.shape[2]
    HALF: gl.constexpr = q_s.shape[1]
    dtype: gl.constexpr = k_s.dtype
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // W, W // 8], [4, 1], [1, 0])
    qk: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    pv: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, W, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=pv, k_width=2)
    of_qk: gl.constexpr = gl.SliceLayout(1, qk)
    of_pv: gl.constexpr = gl.SliceLayout(1, pv)
    own_q, own_qt = q_s.index(PART), qt_s.index(PART)
    c = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, lines))
    q_head = kv_head * GROUP + c % GROUP
    _store_queries(own_q, q, first + c // GROUP, q_head, stop, q_row_stride, D + T, 0)
    if T:
        _store_queries(own_qt, q, first + c // GROUP, q_head, stop, q_row_stride, D + T, D)
    fence_async_shared()

    m = PART * HALF + gl.arange(0, HALF, layout=of_qk)
    row = first + m // GROUP
    real = row < stop
    limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
    # rows ascend: all see the tokens before what the first one sees, and from the first one on that the last one does
    whole = (begin, gl.minimum(gl.load(visible_len + gl.minimum(first + PART * HALF // GROUP, stop - 1)), end))
    least = limit
    if WINDOW:
        least = gl.load(visible_from + row, mask=real, other=0)
        last_row = gl.minimum(first + (PART * HALF + HALF - 1) // GROUP, stop - 1)
        whole = (gl.load(visible_from + last_row), whole[1])
    top = gl.full([HALF], float("-inf"), gl.float32, layout=of_qk)
    total = gl.zeros([HALF], gl.float32, layout=of_qk)
    acc = gl.zeros([HALF, W], gl.float32, layout=pv)
    nothing = gl.zeros([HALF, TILE], gl.float32, layout=qk)
    if count > 0:
        mbarrier.wait(k_full.index(0), 0)
        scores = _scores(own_q, own_qt, k_s.index(0), t_s.index(0), nothing, T)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
        mbarrier.arrive(k_free.index(0), count=1)
        weights, top, total, decay = _softmax(scores, top, total, begin, limit, least, whole, scale_log2, WINDOW)
        for i in range(count - 1):
            # scores of the next tile and products of this one, at once
            stage, next_stage = i % STAGES, (i + 1) % STAGES
            at = begin + (i + 1) * TILE
            p = gl.convert_layout(weights.to(dtype), weights_layout)
            mbarrier.wait(k_full.index(next_stage), ((i + 1) // STAGES) & 1)
            scores = _scores(own_q, own_qt, k_s.index(next_stage), t_s.index(next_stage), nothing, T)
            mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
            acc = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
            scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
            mbarrier.arrive(k_free.index(next_stage), count=1)
            weights, top, total, decay = _softmax(scores, top, total, at, limit, least, whole, scale_log2, WINDOW)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(v_free.index(stage), count=1)
            acc = acc * gl.convert_layout(decay, of_pv)[:, None]
        last = count - 1
        stage = last % STAGES
        p = gl.convert_layout(weights.to(dtype), weights_layout)
        mbarrier.wait(v_full.index(stage), (last // STAGES) & 1)
        if begin + count * TILE > end:
            if PART == 0:
                keep_seen(v_s.index(stage), begin + last * TILE, end, lines)
                fence_async_shared()
                mbarrier.arrive(seen, count=1)
            else:
                mbarrier.wait(seen, 0)
        acc = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])

    cell = cell_of(part_start, row, part, real, SPLIT).to(gl.int64)
    gl.store(lse + cell * num_heads + kv_head * GROUP + m % GROUP, natural_lse(top * scale_log2, total), mask=real)
    o_m = PART * HALF + gl.arange(0, HALF, layout=of_pv)
    o_row = first + o_m // GROUP
    o_cell = cell_of(part_start, o_row, part, o_row < stop, SPLIT).to(gl.int64) * num_heads + kv_head * GROUP
    o_cell += o_m % GROUP
    o_d = gl.arange(0, W, layout=gl.SliceLayout(0, pv))
    value = acc / gl.convert_layout(divisor(total), of_pv)[:, None]
    gl.store(out + o_cell[:, None] * W + o_d[None, :], value.to(out.dtype.element_ty), mask=(o_row < stop)[:, None])


@gluon.jit
def _many_rows_kernel(
    k, v, turned, q, page_table, visible_len, visible_from, pieces, span_start, part_start, out, lse,
    q_row_stride, table_stride, scale_log2, num_heads, num_kv_heads,
    GROUP: gl.constexpr, D: gl.constexpr, W: gl.constexpr, T: gl.constexpr, BLOCK_SIZE: gl.constexpr, M: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr, SPLIT: gl.constexpr, REGISTERS: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = k.dtype
    kv_head = gl.program_id(1)
    # the step's work was uploaded before its first layer
    piece = gl.load(span_start + gl.program_id(0))
    there = piece < gl.load(span_start + gl.program_id(0) + 1)
    its = pieces + piece * PIECE
    first, stop = gl.load(its, mask=there, other=0), gl.load(its + 1, mask=there, other=0)
    begin, end = gl.load(its + 2, mask=there, other=0), gl.load(its + 3, mask=there, other=0)
    part, settled = gl.load(its + 4, mask=there, other=0), gl.load(its + 5, mask=there, other=0)
    count = gl.cdiv(end - begin, TILE)
    table = page_table + gl.load(its + 6, mask=there, other=0).to(gl.int64) * table_stride

    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, W], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2, M // 2, D], k_layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], k_layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, TILE, W], v_layout)
    if T:
        t_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, T], dtype)
        qt_s = gl.allocate_shared_memory(dtype, [2, M // 2, T], t_layout)
        t_s = gl.allocate_shared_memory(dtype, [STAGES, TILE, T], t_layout)
    else:
        qt_s, t_s = q_s, k_s
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    seen = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())  # the last tile is cleared past the end
    mbarrier.init(seen, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_free.index(s), count=2)
        mbarrier.init(v_free.index(s), count=2)
    if there:
        gl.warp_specialize(
            [
                (_attend, (
                    q, q_s, qt_s, k_s, t_s, v_s, k_full, v_full, k_free, v_free, seen, visible_len, visible_from,
                    part_start, out, lse, q_row_stride, scale_log2, num_heads, kv_head, part, first, stop, begin, end,
                    count, 0, GROUP, T, WINDOW, SPLIT, PDL,
                )),
                (_attend, (
                    q, q_s, qt_s, k_s, t_s, v_s, k_full, v_full, k_free, v_free, seen, visible_len, visible_from,
                    part_start, out, lse, q_row_stride, scale_log2, num_heads, kv_head, part, first, stop, begin, end,
                    count, 1, GROUP, T, WINDOW, SPLIT, PDL,
                )),
                (_fetch, (
                    k, v, turned, k_s, t_s, v_s, k_full, v_full, k_free, v_free, table, begin, end, count, settled,
                    kv_head, num_kv_heads, BLOCK_SIZE, T, PDL,
                )),
            ],
            [4, 1],
            [REGISTERS, FETCH_REGISTERS],
        )  # fmt: skip
    elif PDL:
        gdc_wait()  # a kernel that ends without waiting would let the next one pass the one before


def supports(pages: torch.Tensor, group: int) -> bool:
    """Return whether the kernel can read these pages, for groups of so many query heads a KV head."""
    return is_readable(pages) and group <= M


def can_read(made: Workspace) -> bool:
    """Return whether the kernel can read this workspace, of keys of 128 + 64 and values of 128 elements."""
    return (
        capability(made.k.device)[0] == 9
        and made.k.dtype in ELEMENTS
        and (made.k.shape[2], made.turned.shape[1], made.v.shape[2]) == (128, 64, 128)
    )


def _tile(head_dim: int) -> int:
    """Return the tokens of a turn."""
    return TILE_TOKENS * 128 // max(head_dim, 128)


def cutting(group: int, max_rows: int, programs: int, *, head_dim: int) -> Cutting:
    """Return how steps are cut, for ``group`` query heads a KV head of so many elements."""
    return Cutting("many_rows", min(max_rows, M // group), _tile(head_dim), programs, persistent=False)


def attend(
    q_RQD: torch.Tensor,
    pages: torch.Tensor | Workspace,
    rows: Rows,
    work: Work,
    partials: Partials,
    scale: float,
    *,
    pdl: bool,
) -> None:
    """Attend the rows of each sequence to the local shard; see ``PartialAttention``. Partials are written."""
    num_heads = q_RQD.shape[1]
    if isinstance(pages, Workspace):
        num_kv_heads, head_dim, turned_dim, tile = *pages.k.shape[1:], pages.turned.shape[1], TILE_TOKENS
        k, v, turned = (_boxes_of(each, tile) for each in (pages.k, pages.v, pages.turned))
    else:
        num_kv_heads, head_dim, turned_dim = pages.shape[2], pages.shape[4], 0
        tile = _tile(head_dim)
        k = v = turned = boxes_of(pages, tile)
    _many_rows_kernel[(work.programs, num_kv_heads)](
        k, v, turned, q_RQD, rows.page_table, rows.visible_len, rows.seen_from, work.pieces,
        work.span_start, work.span_start if work.part_start is None else work.part_start, partials.out, partials.lse,
        q_RQD.stride(0), rows.page_table.stride(0), scale * LOG2_E, num_heads, num_kv_heads,
        GROUP=num_heads // num_kv_heads, D=head_dim, W=partials.out.shape[-1], T=turned_dim,
        BLOCK_SIZE=pages.block_size if isinstance(pages, Workspace) else pages.shape[3], M=M, TILE=tile, STAGES=STAGES,
        WINDOW=rows.visible_from is not None, SPLIT=work.part_start is not None, REGISTERS=REGISTERS,
        FETCH_REGISTERS=FETCH_REGISTERS, num_warps=4, **early(pdl),
    )  # fmt: skip


def _boxes_of(x: torch.Tensor, tile: int) -> TensorDescriptor:
    """Describe what a workspace has of each token as rows, in boxes of ``tile`` tokens and one head."""
    block = [tile, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[x.dtype])
    return TensorDescriptor(x, [x.shape[0], x[0].numel()], [x.stride(0), 1], block, layout)
