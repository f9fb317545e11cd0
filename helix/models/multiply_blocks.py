"""The kernel that multiplies many rows with quantised matrices in 8 bits, block by block of columns.

A program takes tiles in turn. One of its warps asks for what they need, ahead of the others, and two or three groups of
four multiply 64 rows each: while the products of one run, another adds up what its own were, times the scales of their
rows and columns. See ``chunk_product``, which launches it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _place(
    tile, expert_of, num_experts, num_rows, columns,
    BM: gl.constexpr, HALF: gl.constexpr, SHARED_ROWS: gl.constexpr, EXPERTS: gl.constexpr,
):  # fmt: skip
    """Return a tile's first row and column, which matrices it is multiplied with, and whether there are any."""
    tiles_m, tiles_n = gl.cdiv(num_rows, BM), gl.cdiv(columns, HALF)
    group = tile // (SHARED_ROWS * tiles_n)
    of_group = gl.minimum(tiles_m - group * SHARED_ROWS, SHARED_ROWS)
    in_group = tile % (SHARED_ROWS * tiles_n)
    tile_m = group * SHARED_ROWS + in_group % of_group
    matrix = tile_m * 0
    if EXPERTS:
        matrix = gl.load(expert_of + tile_m)
    return tile_m * BM, in_group // of_group * HALF, matrix, matrix < num_experts


@gluon.jit
def _fetch(
    x, w, x_scales, w_scales, x_tiles, w_parts, x_scale_tiles, w_scale_parts, full, free, expert_of, num_experts,
    num_rows, columns, num_blocks, num_tiles, begin,
    GROUPS: gl.constexpr, SHARED_ROWS: gl.constexpr, EXPERTS: gl.constexpr,
):  # fmt: skip
    """The warp that asks for the tiles of each block of columns, once their stage is free, over the ends of tiles."""
    STAGES: gl.constexpr = full.shape[0]
    PARTS: gl.constexpr = w.block_shape[0]
    HALF: gl.constexpr = w.block_shape[1]
    ROWS: gl.constexpr = x.block_shape[0]
    BM: gl.constexpr = GROUPS * ROWS
    BK: gl.constexpr = w.block_shape[2]
    BYTES: gl.constexpr = (BM + PARTS * HALF) * (BK + 4)
    turn = gl.program_id(0) * 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        m0, n0, matrix, there = _place(
            tile, expert_of, num_experts, num_rows, columns, BM, HALF, SHARED_ROWS, EXPERTS
        )  # fmt: skip
        for block in range(gl.where(there, num_blocks, 0)):
            stage, at = turn % STAGES, block * BK - begin
            bar = full.index(stage)
            mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(w, [matrix * PARTS, n0, at], bar, w_parts.index(stage))
            for group in gl.static_range(GROUPS):
                m, to = m0 + group * ROWS, stage * GROUPS + group
                tma.async_copy_global_to_shared(x, [m, at], bar, x_tiles.index(to))
                tma.async_copy_global_to_shared(x_scales, [block, m], bar, x_scale_tiles.index(to))
            for part in gl.static_range(PARTS):
                row = (matrix * PARTS + part) * columns + n0
                tma.async_copy_global_to_shared(w_scales, [block, row], bar, w_scale_parts.index(stage * PARTS + part))
            turn += 1


@gluon.jit
def _multiply(
    x_tiles, w_tiles, x_scale_tiles, w_scale_tiles, full, free, bias, out, expert_of, num_experts, num_rows, columns,
    num_blocks, num_tiles,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, PARTS: gl.constexpr, SHARED_ROWS: gl.constexpr, EVEN: gl.constexpr,
    HAS_BIAS: gl.constexpr, EXPERTS: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply the same part of each tile's rows, and store the sums."""
    STAGES: gl.constexpr = full.shape[0]
    ROWS: gl.constexpr = x_tiles.shape[1]
    BN: gl.constexpr = w_tiles.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    nothing = gl.zeros([ROWS, BN], gl.float32, layout=layout)
    in_first_half = gl.arange(0, BN, layout=gl.SliceLayout(0, layout)) < BN // 2
    turn = gl.program_id(0) * 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        m0, n0, _matrix, there = _place(
            tile, expert_of, num_experts, num_rows, columns, GROUPS * ROWS, BN // PARTS, SHARED_ROWS, EXPERTS
        )  # fmt: skip
        acc = nothing
        for _block in range(gl.where(there, num_blocks, 0)):
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            own = stage * GROUPS + GROUP
            x_tile, w_tile = x_tiles.index(own), w_tiles.index(stage).permute((1, 0))
            part = warpgroup_mma(x_tile, w_tile, nothing, use_acc=False, is_async=True)
            of_row = x_scale_tiles.index(own).load(gl.SliceLayout(1, layout))
            if EVEN:
                of_half = w_scale_tiles.index(stage).slice(0, 1, dim=0).load(gl.SliceLayout(0, layout))
                of_other = w_scale_tiles.index(stage).slice(BN // 2, 1, dim=0).load(gl.SliceLayout(0, layout))
                of_both = of_half[None, :] * of_row[:, None], of_other[None, :] * of_row[:, None]
                scale = gl.where(in_first_half[None, :], of_both[0], of_both[1])  # known when this is compiled
            else:
                of_column = w_scale_tiles.index(stage).load(gl.SliceLayout(0, layout))
                scale = of_column[None, :] * of_row[:, None]
            part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
            mbarrier.arrive(free.index(stage), count=1)
            acc += part * scale
            turn += 1
        value = acc
        if PARTS == 2:
            gate, up = acc.reshape([ROWS, 2, BN // 2]).permute((0, 2, 1)).split()
            value = gate / (1.0 + gl.exp(-gate)) * up
        flat: gl.constexpr = value.type.layout
        n = n0 + gl.arange(0, BN // PARTS, layout=gl.SliceLayout(0, flat))
        m = m0 + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, flat))
        if HAS_BIAS:
            value += gl.load(bias + n, mask=n < columns, other=0.0).to(gl.float32)[None, :]
        to = out + m.to(gl.int64)[:, None] * columns + n[None, :]
        gl.store(to, value.to(out.dtype.element_ty), mask=((m < num_rows) & there)[:, None] & (n < columns)[None, :])


@gluon.jit(do_not_specialize=["num_experts", "num_rows", "num_blocks", "num_tiles", "begin"])
def multiply_blocks_kernel(
    x, w, x_scales, w_scales, bias, out, expert_of, num_experts, num_rows, columns, num_blocks, num_tiles, begin,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, SHARED_ROWS: gl.constexpr, EVEN: gl.constexpr, HAS_BIAS: gl.constexpr,
    EXPERTS: gl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over blocks of x[m] . w[0, n], times their scales, plus bias[n]; or silu of that times w[1]'s.

    ``x`` describes [R, P] and ``w`` [1 or 2 a matrix, N, P] of 8 bits, columns as they are stored, of which the first
    block has ``begin`` before the first. EXPERTS: each tile of rows has its own matrices. EVEN: the columns of half a
    tile of the result share their scales. A program takes every so many-th of the tiles of ``out``.
    """
    ROWS: gl.constexpr = x.block_shape[0]
    PARTS: gl.constexpr = w.block_shape[0]
    HALF: gl.constexpr = w.block_shape[1]
    BN: gl.constexpr = PARTS * HALF
    BK: gl.constexpr = w.block_shape[2]
    plain: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES * GROUPS, ROWS, BK], x.layout)
    w_parts = gl.allocate_shared_memory(w.dtype, [STAGES, PARTS, HALF, BK], w.layout)
    w_tiles = w_parts._reinterpret(w.dtype, [STAGES, BN, BK], plain)
    x_scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * GROUPS, 1, ROWS], x_scales.layout)
    w_scale_parts = gl.allocate_shared_memory(gl.float32, [STAGES * PARTS, 1, HALF], w_scales.layout)
    x_lines = x_scale_tiles._reinterpret(gl.float32, [STAGES * GROUPS, ROWS], line)
    w_lines = w_scale_parts._reinterpret(gl.float32, [STAGES, BN], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=GROUPS)
    # what is left of the registers is that of the first group
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_multiply, (
                    x_tiles, w_tiles, x_lines, w_lines, full, free, bias, out, expert_of, num_experts, num_rows,
                    columns, num_blocks, num_tiles, 0, GROUPS, PARTS, SHARED_ROWS, EVEN, HAS_BIAS, EXPERTS,
                )),
                (_multiply, (
                    x_tiles, w_tiles, x_lines, w_lines, full, free, bias, out, expert_of, num_experts, num_rows,
                    columns, num_blocks, num_tiles, 1, GROUPS, PARTS, SHARED_ROWS, EVEN, HAS_BIAS, EXPERTS,
                )),
                (_multiply, (
                    x_tiles, w_tiles, x_lines, w_lines, full, free, bias, out, expert_of, num_experts, num_rows,
                    columns, num_blocks, num_tiles, 2, GROUPS, PARTS, SHARED_ROWS, EVEN, HAS_BIAS, EXPERTS,
                )),
                (_fetch, (
                    x, w, x_scales, w_scales, x_tiles, w_parts, x_scale_tiles, w_scale_parts, full, free, expert_of,
                    num_experts, num_rows, columns, num_blocks, num_tiles, begin, GROUPS, SHARED_ROWS, EXPERTS,
                )),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip
    else:
        gl.static_assert(GROUPS == 2)
        gl.warp_specialize(
            [
                (_multiply, (
                    x_tiles, w_tiles, x_lines, w_lines, full, free, bias, out, expert_of, num_experts, num_rows,
                    columns, num_blocks, num_tiles, 0, GROUPS, PARTS, SHARED_ROWS, EVEN, HAS_BIAS, EXPERTS,
                )),
                (_multiply, (
                    x_tiles, w_tiles, x_lines, w_lines, full, free, bias, out, expert_of, num_experts, num_rows,
                    columns, num_blocks, num_tiles, 1, GROUPS, PARTS, SHARED_ROWS, EVEN, HAS_BIAS, EXPERTS,
                )),
                (_fetch, (
                    x, w, x_scales, w_scales, x_tiles, w_parts, x_scale_tiles, w_scale_parts, full, free, expert_of,
                    num_experts, num_rows, columns, num_blocks, num_tiles, begin, GROUPS, SHARED_ROWS, EXPERTS,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
