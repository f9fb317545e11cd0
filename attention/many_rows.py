"""Partial attention of many rows for Hopper: prefill chunks, at the tensor cores' speed.

A program takes a tile of 128 rows x heads of one KV head (the GQA group is packed into the tile) and streams the local
shard through shared memory. The products of a turn overlap the softmax of the next: while the tensor cores add P V of
one tile of tokens, the other units exponentiate the scores of the next (FlashAttention-3, arXiv 2407.08608, section
3.2). The mask is each row's own ``visible_len``; only tiles of tokens that some row does not see whole are masked.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .rows import Rows
from .stream_kv import LOG2_E, TILE, fits, keep_seen, page_tiles

M = 128


@gluon.jit
def _fetch(kv, tiles, bar, stage, token, last, row0, table, page_rows, on, BLOCK_SIZE: gl.constexpr):
    """Ask for the tile that begins at ``token``; past the last token its own tile comes again."""
    TILE: gl.constexpr = kv.block_shape[0]
    at = gl.minimum(token, last)
    page = gl.load(table + at // BLOCK_SIZE, mask=on, other=0)
    row = page * page_rows + row0 + (at % BLOCK_SIZE) // TILE * TILE
    tma.async_copy_global_to_shared(kv, [row, 0], bar, tiles.index(stage), pred=on)


@gluon.jit
def _softmax(scores, top, total, token, limit, scale_log2, masked):
    """Return the weights of a tile of scores, the new maxima and sums, and by what earlier sums decay."""
    scores = scores * scale_log2
    if masked:
        t = token + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(t[None, :] < limit[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1))
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    decay = gl.exp2(top - shift)
    weights = gl.exp2(scores - shift[:, None])
    return weights, new_top, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def _many_rows_kernel(
    kv, q, page_table, row_seq, visible_len, query_start, out, lse,
    q_row_stride, table_stride, scale_log2, num_rows, num_heads, num_kv_heads, tiles,
    GROUP: gl.constexpr, TILE_ROWS: gl.constexpr, BLOCK_SIZE: gl.constexpr, M: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    TILE: gl.constexpr = kv.block_shape[0]
    D: gl.constexpr = kv.block_shape[1]
    dtype: gl.constexpr = kv.dtype
    BYTES: gl.constexpr = TILE * D * dtype.primitive_bitwidth // 8
    # the last tiles of a run see most: they begin first
    run, tile = gl.program_id(0) // tiles, tiles - 1 - gl.program_id(0) % tiles
    kv_head, split = gl.program_id(1), gl.program_id(2)
    first = gl.load(query_start + run) + tile * TILE_ROWS
    stop = gl.minimum(gl.load(query_start + run + 1), first + TILE_ROWS)
    if first >= stop:
        return
    longest, shortest = gl.load(visible_len + stop - 1), gl.load(visible_len + first)
    share = gl.cdiv(gl.cdiv(longest, SPLITS), TILE) * TILE
    begin = split * share
    end = gl.minimum(begin + share, longest)
    count = gl.cdiv(gl.maximum(end - begin, 0), TILE)
    table = page_table + gl.load(row_seq + first).to(gl.int64) * table_stride
    page_rows = 2 * num_kv_heads * BLOCK_SIZE
    k_row, v_row = kv_head * BLOCK_SIZE, (num_kv_heads + kv_head) * BLOCK_SIZE

    k_s = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], kv.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], kv.layout)
    k_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(s), count=1)
        mbarrier.init(v_bars.index(s), count=1)
    for s in gl.static_range(STAGES):
        at = begin + s * TILE
        mbarrier.expect(k_bars.index(s), BYTES, pred=s < count)
        _fetch(kv, k_s, k_bars.index(s), s, at, end - 1, k_row, table, page_rows, s < count, BLOCK_SIZE)
        mbarrier.expect(v_bars.index(s), BYTES, pred=s < count)
        _fetch(kv, v_s, v_bars.index(s), s, at, end - 1, v_row, table, page_rows, s < count, BLOCK_SIZE)

    warps: gl.constexpr = gl.num_warps()
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [warps, 1], [1, 0])
    qk: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, TILE, 16])
    pv: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, D, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=pv, k_width=2)
    of_qk: gl.constexpr = gl.SliceLayout(1, qk)
    of_pv: gl.constexpr = gl.SliceLayout(1, pv)
    q_s = gl.allocate_shared_memory(dtype, [M, D], kv.layout)
    c = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, lines))
    q_row = (first + c // GROUP).to(gl.int64)
    from_q = q + (q_row * q_row_stride + (kv_head * GROUP + c % GROUP) * D)[:, None] + d[None, :]
    q_s.store(gl.load(from_q, mask=((c < TILE_ROWS * GROUP) & (q_row < stop))[:, None], other=0.0))
    fence_async_shared()

    m = gl.arange(0, M, layout=of_qk)
    row = first + m // GROUP
    real = (m < TILE_ROWS * GROUP) & (row < stop)
    limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
    top = gl.full([M], float("-inf"), gl.float32, layout=of_qk)
    total = gl.zeros([M], gl.float32, layout=of_qk)
    acc = gl.zeros([M, D], gl.float32, layout=pv)
    nothing = gl.zeros([M, TILE], gl.float32, layout=qk)
    if count > 0:
        mbarrier.wait(k_bars.index(0), 0)
        scores = warpgroup_mma(q_s, k_s.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
        at = begin + STAGES * TILE
        mbarrier.expect(k_bars.index(0), BYTES, pred=count > STAGES)
        _fetch(kv, k_s, k_bars.index(0), 0, at, end - 1, k_row, table, page_rows, count > STAGES, BLOCK_SIZE)
        weights, top, total, decay = _softmax(scores, top, total, begin, limit, scale_log2, begin + TILE > shortest)
        for i in range(count):
            # scores of the next tile and products of this one, at once; the last turn has no next tile
            stage, phase = i % STAGES, (i // STAGES) & 1
            j = gl.minimum(i + 1, count - 1)
            more = i + 1 < count
            next_stage = j % STAGES
            p = gl.convert_layout(weights.to(dtype), weights_layout)
            if more:
                mbarrier.wait(k_bars.index(next_stage), (j // STAGES) & 1)
            scores = warpgroup_mma(q_s, k_s.index(next_stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_bars.index(stage), phase)
            at = begin + i * TILE
            if at + TILE > end:
                keep_seen(v_s.index(stage), at, end, lines)
                fence_async_shared()
            acc = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
            scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
            if more:
                masked = at + 2 * TILE > gl.minimum(shortest, end)
                weights, top, total, decay = _softmax(scores, top, total, at + TILE, limit, scale_log2, masked)
            else:
                decay = gl.full([M], 1.0, gl.float32, layout=of_qk)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            acc = acc * gl.convert_layout(decay, of_pv)[:, None]
            k_turn, v_turn = i + 1 + STAGES, i + STAGES
            mbarrier.expect(k_bars.index(next_stage), BYTES, pred=k_turn < count)
            _fetch(kv, k_s, k_bars.index(next_stage), next_stage, begin + k_turn * TILE, end - 1, k_row, table,
                   page_rows, k_turn < count, BLOCK_SIZE)  # fmt: skip
            mbarrier.expect(v_bars.index(stage), BYTES, pred=v_turn < count)
            _fetch(kv, v_s, v_bars.index(stage), stage, begin + v_turn * TILE, end - 1, v_row, table, page_rows,
                   v_turn < count, BLOCK_SIZE)  # fmt: skip

    empty = total == 0.0
    sums = gl.where(empty, 1.0, total)
    cell = (split * num_rows + row).to(gl.int64) * num_heads + kv_head * GROUP + m % GROUP
    natural = gl.where(empty, float("-inf"), (top + gl.log2(sums)) / 1.4426950408889634)
    gl.store(lse + cell, natural, mask=real)
    if (SPLITS == 1) | (count > 0):  # whoever merges splits does not read those with lse = -inf
        o_m = gl.arange(0, M, layout=of_pv)
        o_row = first + o_m // GROUP
        o_cell = (split * num_rows + o_row).to(gl.int64) * num_heads + kv_head * GROUP + o_m % GROUP
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, pv))
        value = acc / gl.convert_layout(sums, of_pv)[:, None]
        there = (o_m < TILE_ROWS * GROUP) & (o_row < stop)
        gl.store(out + o_cell[:, None] * D + o_d[None, :], value.to(out.dtype.element_ty), mask=there[:, None])


def supports(pages: torch.Tensor, group: int) -> bool:
    """Return whether the kernel can read these pages, for groups of so many query heads a KV head."""
    return fits(pages) and group <= M and pages.shape[4] <= 128


def many_rows_attention(
    q_RQD: torch.Tensor, pages: torch.Tensor, rows: Rows, scale: float, *, processors: int, pdl: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the rows of each sequence to the local shard; see ``PartialAttention``."""
    num_rows, num_heads, head_dim = q_RQD.shape
    num_kv_heads, block_size = pages.shape[2], pages.shape[3]
    group, runs = num_heads // num_kv_heads, rows.query_start.shape[0] - 1
    tile_rows = min(rows.max_rows, M // group)
    tiles = -(-rows.max_rows // tile_rows)
    programs = runs * tiles * num_kv_heads
    splits = max(1, min(processors // programs, -(-rows.max_visible_len // TILE)))
    dtype = torch.float32 if splits > 1 else q_RQD.dtype
    part = torch.empty((splits, num_rows, num_heads, head_dim), dtype=dtype, device=q_RQD.device)
    lse = torch.empty((splits, num_rows, num_heads), dtype=torch.float32, device=q_RQD.device)
    _many_rows_kernel[(runs * tiles, num_kv_heads, splits)](
        page_tiles(pages), q_RQD, rows.page_table, rows.row_seq, rows.visible_len, rows.query_start, part, lse,
        q_RQD.stride(0), rows.page_table.stride(0), scale * LOG2_E, num_rows, num_heads, num_kv_heads, tiles,
        GROUP=group, TILE_ROWS=tile_rows, BLOCK_SIZE=block_size, M=M, SPLITS=splits, STAGES=3, PDL=pdl,
        num_warps=8, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return part, lse
