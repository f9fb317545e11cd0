"""Warps that sum latents by weight for ``stream_latent`` and ``stream_latent_eight_bits``, and store the sums."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from .page_tiles import PIECE, cell_of
from .weigh_latents import NOTES, as_widened


@gluon.jit
def sum_up(
    values, turned, notes, free, said, heard, pieces, first_piece, last_piece, part_start, out, num_heads, first_head,
    PART: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr, M: gl.constexpr,
    IN_8_BITS: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four warps that sum a share of the elements of values by weight, and store them for each piece."""
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = free.shape[0]
    TILE: gl.constexpr = values.shape[1]
    VALUE: gl.constexpr = values.shape[2]
    TURNED: gl.constexpr = turned.shape[2]
    SHARE: gl.constexpr = VALUE // GROUPS
    dtype: gl.constexpr = values.dtype
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    columns: gl.constexpr = gl.SliceLayout(0, wgmma)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], dtype)
    m = gl.arange(0, M, layout=columns)
    d = PART * SHARE + gl.arange(0, SHARE, layout=gl.SliceLayout(1, wgmma))
    if IN_8_BITS:
        d = as_widened(d)
    weights_s = turned._reinterpret(dtype, [STAGES * (TURNED // M), M, TILE], weights_layout)
    shares = values._reinterpret(dtype, [STAGES * GROUPS, TILE, SHARE], turned.type.layout)
    turn = first_piece * 0
    note = first_piece * 0
    for piece in range(first_piece, last_piece):
        its = pieces + piece * PIECE
        first, stop, begin, end = gl.load(its), gl.load(its + 1), gl.load(its + 2), gl.load(its + 3)
        row, head = first + m // HEADS, first_head + m % HEADS
        real = (row < stop) & (head < num_heads)
        cell = cell_of(part_start, row, gl.load(its + 4), real, SPLIT) * num_heads + head
        acc = gl.zeros([SHARE, M], gl.float32, layout=wgmma)
        for _ in range(begin, end, TILE):
            stage, slot = turn % STAGES, note % NOTES
            mbarrier.wait(said.index(slot), (note // NOTES) & 1)
            decay = notes.index(slot).load(columns)
            acc = acc * decay[None, :]
            share = shares.index(stage * GROUPS + PART).permute((1, 0))
            acc = warpgroup_mma(share, weights_s.index(stage * (TURNED // M)).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            mbarrier.arrive(heard.index(slot), count=1)
            turn += 1
            note += 1
        mbarrier.wait(said.index(note % NOTES), (note // NOTES) & 1)
        value = acc * notes.index(note % NOTES).load(columns)[None, :]
        mbarrier.arrive(heard.index(note % NOTES), count=1)
        note += 1
        gl.store(
            out + cell.to(gl.int64)[None, :] * VALUE + d[:, None], value.to(out.dtype.element_ty), mask=real[None, :]
        )


@gluon.jit
def sum_heads(
    values, turned, notes, free, said, heard, pieces, first_piece, last_piece, part_start, out, num_heads, first_head,
    PART: gl.constexpr, GROUPS: gl.constexpr, HEADS: gl.constexpr, M: gl.constexpr,
    IN_8_BITS: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As ``sum_up``, where rows x heads fill the tensor core's 64 rows: O += P values."""
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = free.shape[0]
    TILE: gl.constexpr = values.shape[1]
    VALUE: gl.constexpr = values.shape[2]
    TURNED: gl.constexpr = turned.shape[2]
    SHARE: gl.constexpr = VALUE // GROUPS
    dtype: gl.constexpr = values.dtype
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, wgmma)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], dtype)
    m = gl.arange(0, M, layout=of_rows)
    d = PART * SHARE + gl.arange(0, SHARE, layout=gl.SliceLayout(0, wgmma))
    if IN_8_BITS:
        d = as_widened(d)
    weights_s = turned._reinterpret(dtype, [STAGES * (TURNED // M), M, TILE], weights_layout)
    shares = values._reinterpret(dtype, [STAGES * GROUPS, TILE, SHARE], turned.type.layout)
    turn = first_piece * 0
    note = first_piece * 0
    for piece in range(first_piece, last_piece):
        its = pieces + piece * PIECE
        first, stop, begin, end = gl.load(its), gl.load(its + 1), gl.load(its + 2), gl.load(its + 3)
        row, head = first + m // HEADS, first_head + m % HEADS
        real = (row < stop) & (head < num_heads)
        cell = cell_of(part_start, row, gl.load(its + 4), real, SPLIT) * num_heads + head
        acc = gl.zeros([M, SHARE], gl.float32, layout=wgmma)
        for _ in range(begin, end, TILE):
            stage, slot = turn % STAGES, note % NOTES
            mbarrier.wait(said.index(slot), (note // NOTES) & 1)
            acc = acc * notes.index(slot).load(of_rows)[:, None]
            weights = weights_s.index(stage * (TURNED // M))
            acc = warpgroup_mma(weights, shares.index(stage * GROUPS + PART), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            mbarrier.arrive(heard.index(slot), count=1)
            turn += 1
            note += 1
        mbarrier.wait(said.index(note % NOTES), (note // NOTES) & 1)
        value = acc * notes.index(note % NOTES).load(of_rows)[:, None]
        mbarrier.arrive(heard.index(note % NOTES), count=1)
        note += 1
        to = out + cell.to(gl.int64)[:, None] * VALUE + d[None, :]
        gl.store(to, value.to(out.dtype.element_ty), mask=real[:, None])
