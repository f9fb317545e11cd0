"""Warps that weigh latents for ``stream_latent`` and ``stream_latent_eight_bits``: scores, softmax, notes.

Weights take the place of a tile's turned part, which nobody needs once the scores are there.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from .online_softmax import divisor, natural_lse
from .page_tiles import PIECE, cell_of, exp2, keep_seen

NOTES = gl.constexpr(2)


@gluon.jit
def as_widened(d):
    """Return which element of values stands at d where bytes are widened: of every four the two in the middle swap."""
    return (d & -4) | ((d & 1) << 1) | ((d >> 1) & 1)


@gluon.jit
def pages_of(table, token, end, BLOCK_SIZE: gl.constexpr):
    """Return the pages of tokens, page 0 past the end."""
    return gl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)


@gluon.jit
def scales_of(page, scales, token, end, scale_stride, BLOCK_SIZE: gl.constexpr):
    """Return the scales of tokens, 0 past the end."""
    return gl.load(scales + page.to(gl.int64) * scale_stride + token % BLOCK_SIZE, mask=token < end, other=0.0)


@gluon.jit
def _take_queries(
    q, q_values, q_turned, first, stop, q_row_stride, num_heads, first_head, HEADS: gl.constexpr,
    IN_8_BITS: gl.constexpr,
):  # fmt: skip
    """Store a piece's queries where products read them; each load is on its way while the one before is stored."""
    M: gl.constexpr = q_values.shape[0]
    VALUE: gl.constexpr = q_values.shape[1]
    TURNED: gl.constexpr = q_turned.shape[1]
    STRIP: gl.constexpr = min(VALUE, 4096 // M if IN_8_BITS else 8192 // M)
    LANES: gl.constexpr = min(32, STRIP // 8)
    dtype: gl.constexpr = q_turned.dtype
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // TURNED, TURNED // 8], [4, 1], [1, 0])
    long: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    strips = q_values._reinterpret(dtype, [VALUE // STRIP, M, STRIP], q_turned.layout)
    c = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
    d = VALUE + gl.arange(0, TURNED, layout=gl.SliceLayout(0, lines))
    row, head = first + c // HEADS, first_head + c % HEADS
    from_q = q + (row.to(gl.int64) * q_row_stride + head * (VALUE + TURNED))[:, None] + d[None, :]
    turned = gl.load(from_q, mask=((row < stop) & (head < num_heads))[:, None], other=0.0)
    c = gl.arange(0, M, layout=gl.SliceLayout(1, long))
    d = gl.arange(0, STRIP, layout=gl.SliceLayout(0, long))
    row, head = first + c // HEADS, first_head + c % HEADS
    from_q = q + (row.to(gl.int64) * q_row_stride + head * (VALUE + TURNED))[:, None] + d[None, :]
    there = ((row < stop) & (head < num_heads))[:, None]
    part = gl.load(from_q, mask=there, other=0.0)
    q_turned.store(turned)
    for strip in gl.static_range(VALUE // STRIP):
        value = part
        if strip + 1 < VALUE // STRIP:
            part = gl.load(from_q + (strip + 1) * STRIP, mask=there, other=0.0)
        if IN_8_BITS:  # in the order of widened bytes
            value = (value.to(gl.float32) * 1.2676506002282294e30).to(dtype)  # 2 ** 100
            value = value.reshape([M, STRIP // 4, 2, 2]).permute((0, 1, 3, 2)).reshape([M, STRIP])
            value = gl.convert_layout(value, long)
        strips.index(strip).store(value)
    fence_async_shared()


@gluon.jit
def weigh(
    q, values, turned, q_values, q_turned, notes, full, said, heard, pieces, first_piece, last_piece, visible_len,
    part_start, lse, q_row_stride, scale_log2, num_heads, first_head, scales, scale_s, page_table, table_stride,
    scale_stride,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, IN_8_BITS: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that make the weights of each tile, in the place of its turned part, and note how sums change."""
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = full.shape[0]
    TILE: gl.constexpr = values.shape[1]
    VALUE: gl.constexpr = values.shape[2]
    TURNED: gl.constexpr = turned.shape[2]
    M: gl.constexpr = q_values.shape[0]
    STRIPS: gl.constexpr = VALUE // TURNED
    dtype: gl.constexpr = values.dtype
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // TURNED, TURNED // 8], [4, 1], [1, 0])
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    columns: gl.constexpr = gl.SliceLayout(0, wgmma)
    m = gl.arange(0, M, layout=columns)
    token = gl.arange(0, TILE, layout=gl.SliceLayout(1, wgmma))
    its_token = gl.arange(0, TILE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    nothing = gl.zeros([TILE, M], gl.float32, layout=wgmma)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], dtype)
    weights_s = turned._reinterpret(dtype, [STAGES * (TURNED // M), M, TILE], weights_layout)
    strips = values._reinterpret(dtype, [STAGES * STRIPS, TILE, TURNED], turned.type.layout)
    turn = first_piece * 0
    note = first_piece * 0
    for piece in range(first_piece, last_piece):
        # loaded here and not carried from one piece to the next: see ``stream_kv``
        its = pieces + piece * PIECE
        first, stop, begin, end = gl.load(its), gl.load(its + 1), gl.load(its + 2), gl.load(its + 3)
        if IN_8_BITS:
            table = page_table + gl.load(its + 6).to(gl.int64) * table_stride
            page = pages_of(table, begin + its_token, end, BLOCK_SIZE)
            its_scale = scales_of(page, scales, begin + its_token, end, scale_stride, BLOCK_SIZE)
            page = pages_of(table, begin + TILE + its_token, end, BLOCK_SIZE)
        _take_queries(q, q_values, q_turned, first, stop, q_row_stride, num_heads, first_head, HEADS, IN_8_BITS)
        row, head = first + m // HEADS, first_head + m % HEADS
        real = (row < stop) & (head < num_heads)
        limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
        top = gl.full([M], float("-inf"), gl.float32, layout=columns)
        total = gl.zeros([TILE, M], gl.float32, layout=wgmma)
        for at in range(begin, end, TILE):
            stage, slot = turn % STAGES, note % NOTES
            if IN_8_BITS:
                # asked for a turn early, and their pages two: an address that waits for a load would hold up the turn
                scale_s.store(its_scale)
                its_scale = scales_of(page, scales, at + TILE + its_token, end, scale_stride, BLOCK_SIZE)
                page = pages_of(table, at + 2 * TILE + its_token, end, BLOCK_SIZE)
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            s = warpgroup_mma(values.index(stage), q_values.permute((1, 0)), nothing, use_acc=False, is_async=True)
            t = nothing if IN_8_BITS else s
            t = warpgroup_mma(turned.index(stage), q_turned.permute((1, 0)), t, use_acc=not IN_8_BITS, is_async=True)
            t = warpgroup_mma_wait(num_outstanding=0, deps=[t])
            if IN_8_BITS:
                s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
                token_scale = scale_s.load(gl.SliceLayout(1, wgmma))
                t = s * (token_scale * 1048576.0)[:, None] + t  # 2 ** 20: a widened byte lacks 2 ** 120
            s = gl.where((at + token)[:, None] < limit[None, :], t * scale_log2, float("-inf"))
            new_top = gl.maximum(top, gl.max(s, 0))
            shift = gl.where(new_top == float("-inf"), 0.0, new_top)
            decay = exp2(top - shift)
            weights = exp2(s - shift[None, :])
            total = total * decay[None, :] + weights
            if IN_8_BITS:
                weights = weights * (token_scale * 1.2676506002282294e30)[:, None]
            weights_s.index(stage * (TURNED // M)).permute((1, 0)).store(weights.to(dtype))
            if (at + TILE > end) & (not IN_8_BITS):  # a widened byte is always a number
                for strip in gl.static_range(STRIPS):
                    keep_seen(strips.index(stage * STRIPS + strip), at, end, lines)
            mbarrier.wait(heard.index(slot), ((note // NOTES) & 1) ^ 1)
            notes.index(slot).store(decay)
            fence_async_shared()
            mbarrier.arrive(said.index(slot), count=1)
            top = new_top
            turn += 1
            note += 1

        sums = gl.sum(total, 0)
        mbarrier.wait(heard.index(note % NOTES), ((note // NOTES) & 1) ^ 1)
        notes.index(note % NOTES).store((1048576.0 if IN_8_BITS else 1.0) / divisor(sums))
        mbarrier.arrive(said.index(note % NOTES), count=1)
        note += 1
        cell = cell_of(part_start, row, gl.load(its + 4), real, SPLIT) * num_heads + head
        gl.store(lse + cell, natural_lse(top, sums), mask=real)


@gluon.jit
def weigh_heads(
    q, values, turned, q_values, q_turned, notes, full, said, heard, pieces, first_piece, last_piece, visible_len,
    part_start, lse, q_row_stride, scale_log2, num_heads, first_head, scales, scale_s, page_table, table_stride,
    scale_stride,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, IN_8_BITS: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As ``weigh``, where rows x heads fill the tensor core's 64 rows: S = q [values | turned]^T.

    A softmax then stays within four threads, and what there is of a column, with a pair of them.
    """
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = full.shape[0]
    TILE: gl.constexpr = values.shape[1]
    VALUE: gl.constexpr = values.shape[2]
    TURNED: gl.constexpr = turned.shape[2]
    M: gl.constexpr = q_values.shape[0]
    STRIPS: gl.constexpr = VALUE // TURNED
    dtype: gl.constexpr = values.dtype
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // TURNED, TURNED // 8], [4, 1], [1, 0])
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, wgmma)
    m = gl.arange(0, M, layout=of_rows)
    token = gl.arange(0, TILE, layout=gl.SliceLayout(0, wgmma))
    its_token = gl.arange(0, TILE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    nothing = gl.zeros([M, TILE], gl.float32, layout=wgmma)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], dtype)
    weights_s = turned._reinterpret(dtype, [STAGES * (TURNED // M), M, TILE], weights_layout)
    strips = values._reinterpret(dtype, [STAGES * STRIPS, TILE, TURNED], turned.type.layout)
    turn = first_piece * 0
    note = first_piece * 0
    for piece in range(first_piece, last_piece):
        # loaded here and not carried from one piece to the next: see ``stream_kv``
        its = pieces + piece * PIECE
        first, stop, begin, end = gl.load(its), gl.load(its + 1), gl.load(its + 2), gl.load(its + 3)
        if IN_8_BITS:
            table = page_table + gl.load(its + 6).to(gl.int64) * table_stride
            page = pages_of(table, begin + its_token, end, BLOCK_SIZE)
            its_scale = scales_of(page, scales, begin + its_token, end, scale_stride, BLOCK_SIZE)
            page = pages_of(table, begin + TILE + its_token, end, BLOCK_SIZE)
        _take_queries(q, q_values, q_turned, first, stop, q_row_stride, num_heads, first_head, HEADS, IN_8_BITS)
        row, head = first + m // HEADS, first_head + m % HEADS
        real = (row < stop) & (head < num_heads)
        limit = gl.minimum(gl.load(visible_len + row, mask=real, other=0), end)
        top = gl.full([M], float("-inf"), gl.float32, layout=of_rows)
        total = gl.zeros([M], gl.float32, layout=of_rows)
        for at in range(begin, end, TILE):
            stage, slot = turn % STAGES, note % NOTES
            if IN_8_BITS:
                # asked for a turn early, and their pages two: an address that waits for a load would hold up the turn
                scale_s.store(its_scale)
                its_scale = scales_of(page, scales, at + TILE + its_token, end, scale_stride, BLOCK_SIZE)
                page = pages_of(table, at + 2 * TILE + its_token, end, BLOCK_SIZE)
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            s = warpgroup_mma(q_values, values.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            t = nothing if IN_8_BITS else s
            t = warpgroup_mma(q_turned, turned.index(stage).permute((1, 0)), t, use_acc=not IN_8_BITS, is_async=True)
            t = warpgroup_mma_wait(num_outstanding=0, deps=[t])
            if IN_8_BITS:
                s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
                t = s * (scale_s.load(gl.SliceLayout(0, wgmma)) * 1048576.0)[None, :] + t  # see ``weigh``
            s = gl.where((at + token)[None, :] < limit[:, None], t * scale_log2, float("-inf"))
            new_top = gl.maximum(top, gl.max(s, 1))
            shift = gl.where(new_top == float("-inf"), 0.0, new_top)
            decay = exp2(top - shift)
            weights = exp2(s - shift[:, None])
            total = total * decay + gl.sum(weights, 1)
            if IN_8_BITS:
                weights = weights * (scale_s.load(gl.SliceLayout(0, wgmma)) * 1.2676506002282294e30)[None, :]
            weights_s.index(stage * (TURNED // M)).store(weights.to(dtype))
            if (at + TILE > end) & (not IN_8_BITS):
                for strip in gl.static_range(STRIPS):
                    keep_seen(strips.index(stage * STRIPS + strip), at, end, lines)
            mbarrier.wait(heard.index(slot), ((note // NOTES) & 1) ^ 1)
            notes.index(slot).store(decay)
            fence_async_shared()
            mbarrier.arrive(said.index(slot), count=1)
            top = new_top
            turn += 1
            note += 1

        mbarrier.wait(heard.index(note % NOTES), ((note // NOTES) & 1) ^ 1)
        notes.index(note % NOTES).store((1048576.0 if IN_8_BITS else 1.0) / divisor(total))
        mbarrier.arrive(said.index(note % NOTES), count=1)
        note += 1
        cell = cell_of(part_start, row, gl.load(its + 4), real, SPLIT) * num_heads + head
        gl.store(lse + cell, natural_lse(top, total), mask=real)
