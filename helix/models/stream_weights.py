"""The kernels that stream weights past few rows, for matrices of 16 bits and for quantised ones.

What they compute, and why like this, is said in ``linear.py``, which launches them.

    EXPERTS   grid (y)            a turn reads                        x                       what is written
    None      splits of K         matrix 0, BK columns                its columns             summands [splits, R, N]
    "each"    experts in use      its expert's matrices               the same for all        weighted units [J, R, F]
    "all"     splits of all K     the turn's expert's matrix          that expert's rows      summands [splits, R, h]
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def stream_weights_kernel(
    w, x, bias, out, experts, num_experts, row_weights, num_rows, columns, num_turns,
    BM: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, HAS_BIAS: gl.constexpr, EXPERTS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """out[split, m, n] = x[m, :] . w[0, n, :] over the split's part of K; or silu of that times x[m, :] . w[1, n, :].

    ``w`` describes [1 or 2, N, K] in tiles of BN rows together, ``x`` [R, K] in tiles of BM; a turn takes one of each.
    What lies outside the tensors is read as zero.

    EXPERTS "each": ``w`` describes the matrices of all experts, and each split is an expert in use, whose products
    are weighted row by row. EXPERTS "all": K goes through all experts in use, and ``x`` describes [their rows, K].
    """
    EACH: gl.constexpr = EXPERTS == "each"
    if PDL:
        if EACH:
            gdc_wait()  # first: the kernel after this one may then read which experts are in use before it waits
        gdc_launch_dependents()
    PARTS: gl.constexpr = w.block_shape[0]
    HALF: gl.constexpr = w.block_shape[1]
    BN: gl.constexpr = PARTS * HALF
    BK: gl.constexpr = w.block_shape[2]
    BYTES: gl.constexpr = (BN + BM) * BK * w.dtype.primitive_bitwidth // 8
    n0, split = gl.program_id(0) * HALF, gl.program_id(1)
    if EACH:
        first, used = split * num_turns, split < gl.load(num_experts, cache_modifier=".cg")
        count = gl.where(used, num_turns, 0)
    else:
        total, used = num_turns, True
        if EXPERTS == "all":
            total *= gl.load(num_experts, cache_modifier=".cg")
        first = split * total // SPLITS
        count = (split + 1) * total // SPLITS - first
    stop = first + count
    w_parts = gl.allocate_shared_memory(w.dtype, [STAGES, PARTS, HALF, BK], w.layout)
    w_tiles = w_parts._reinterpret(w.dtype, [STAGES, BN, BK], x.layout)
    x_tiles = gl.allocate_shared_memory(w.dtype, [STAGES, BM, BK], x.layout)
    # made here, so that it shares no memory with tiles: a warp may be done while another's products still read them
    sums = gl.allocate_shared_memory(gl.float32, [BN, BM], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    for s in gl.static_range(STAGES):
        turn = first + s
        matrix, _, at = _place(
            turn, _matrix_of(turn, stop, experts, num_turns, EXPERTS), num_turns, num_rows, EXPERTS, BK
        )
        mbarrier.expect(bars.index(s), BYTES, pred=s < count)
        tma.async_copy_global_to_shared(w, [matrix * PARTS, n0, at], bars.index(s), w_parts.index(s), pred=s < count)
    if PDL and not EACH:
        gdc_wait()
    for s in gl.static_range(STAGES):
        _, row, at = _place(first + s, 0, num_turns, num_rows, EXPERTS, BK)
        tma.async_copy_global_to_shared(x, [row, at], bars.index(s), x_tiles.index(s), pred=s < count)
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    acc = gl.zeros([BN, BM], gl.float32, layout=layout)
    ahead = _matrix_of(stop, stop, experts, num_turns, EXPERTS)
    for i in range(count):
        now = i % STAGES
        mbarrier.wait(bars.index(now), (i // STAGES) & 1)
        acc = warpgroup_mma(w_tiles.index(now), x_tiles.index(now).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        # the products of the turn before are done: its stage takes the tiles of the turn that comes next there
        turn = i - 1 + STAGES
        more = (i > 0) & (turn < count)
        then = turn % STAGES
        matrix, row, at = _place(first + turn, ahead, num_turns, num_rows, EXPERTS, BK)
        mbarrier.expect(bars.index(then), BYTES, pred=more)
        tma.async_copy_global_to_shared(w, [matrix * PARTS, n0, at], bars.index(then), w_parts.index(then), pred=more)
        tma.async_copy_global_to_shared(x, [row, at], bars.index(then), x_tiles.index(then), pred=more)
        ahead = _matrix_of(first + turn + 1, stop, experts, num_turns, EXPERTS)  # asked for a turn early
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])

    sums.store(acc)
    _finish(
        sums, bias, out, experts, row_weights, num_rows, columns, n0, split, used, first, stop, num_turns,
        PARTS, HALF, BM, 4, HAS_BIAS, EXPERTS,
    )  # fmt: skip


@gluon.jit
def stream_quantized_kernel(
    w, x, scales, scale_stride, shift, bias, out, experts, num_experts, row_weights, num_rows, columns, num_turns,
    BM: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, HAS_BIAS: gl.constexpr, EXPERTS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Do what ``stream_weights_kernel`` does for matrices of 8 bits, whose tiles are widened in registers.

    ``w`` describes bytes. A turn is one block of columns of the whole matrix, so that each row has one scale in it,
    which the turn's products are multiplied by: the first turn begins ``shift`` columns before the slice, where both
    operands are read as zero. ``scales`` [num_turns, rows of all matrices] come beside the tiles, in a ring of their
    own: memory answers later than a turn takes.
    """
    EACH: gl.constexpr = EXPERTS == "each"
    if PDL:
        if EACH:
            gdc_wait()
        gdc_launch_dependents()
    PARTS: gl.constexpr = w.block_shape[0]
    HALF: gl.constexpr = w.block_shape[1]
    BN: gl.constexpr = PARTS * HALF
    BK: gl.constexpr = w.block_shape[2]
    WARPS: gl.constexpr = BN // 16
    BYTES: gl.constexpr = (BN + BM * x.dtype.primitive_bitwidth // 8) * BK
    n0, split = gl.program_id(0) * HALF, gl.program_id(1)
    if EACH:
        first, used = split * num_turns, split < gl.load(num_experts, cache_modifier=".cg")
        count = gl.where(used, num_turns, 0)
    else:
        total, used = num_turns, True
        if EXPERTS == "all":
            total *= gl.load(num_experts, cache_modifier=".cg")
        first = split * total // SPLITS
        count = (split + 1) * total // SPLITS - first
    stop = first + count
    plain: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    w_parts = gl.allocate_shared_memory(w.dtype, [STAGES, PARTS, HALF, BK], w.layout)
    w_tiles = w_parts._reinterpret(w.dtype, [STAGES, BN, BK], plain)
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BK], x.layout)
    sums = gl.allocate_shared_memory(gl.float32, [BN, BM], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    ring = gl.allocate_shared_memory(gl.float32, [STAGES, BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    row = gl.arange(0, BN, layout=line)
    here = n0 + row % HALF < columns
    of_tile = row // HALF * columns + n0 + row % HALF  # the tile's rows among those of its matrix
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    for s in gl.static_range(STAGES):
        turn = first + s
        matrix, _, at = _place(
            turn, _matrix_of(turn, stop, experts, num_turns, EXPERTS), num_turns, num_rows, EXPERTS, BK
        )
        mbarrier.expect(bars.index(s), BYTES, pred=s < count)
        tma.async_copy_global_to_shared(
            w, [matrix * PARTS, n0, at - shift], bars.index(s), w_parts.index(s), pred=s < count
        )
        its = scales + (at // BK).to(gl.int64) * scale_stride + matrix * PARTS * columns
        async_copy.async_copy_global_to_shared(ring.index(s), its + of_tile, mask=here & (s < count))
        async_copy.commit_group()
    if PDL and not EACH:
        gdc_wait()
    for s in gl.static_range(STAGES):
        _, x_row, at = _place(first + s, 0, num_turns, num_rows, EXPERTS, BK)
        tma.async_copy_global_to_shared(x, [x_row, at - shift], bars.index(s), x_tiles.index(s), pred=s < count)
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    acc = gl.zeros([BN, BM], gl.float32, layout=layout)
    ahead = _matrix_of(stop, stop, experts, num_turns, EXPERTS)
    for i in range(count):
        now = i % STAGES
        mbarrier.wait(bars.index(now), (i // STAGES) & 1)
        async_copy.wait_group(STAGES - 2)  # the first turn of the loop commits a group that no turn reads
        wide = _widen(w_tiles.index(now).load(operand), x.dtype)
        part = gl.zeros([BN, BM], gl.float32, layout=layout)
        part = warpgroup_mma(wide, x_tiles.index(now).permute((1, 0)), part, use_acc=False, is_async=True)
        scale = ring.index(now).load(gl.SliceLayout(1, layout))
        # all warps have read the turn before: its stage takes the tiles of the turn that comes next there
        turn = i - 1 + STAGES
        more = (i > 0) & (turn < count)
        then = turn % STAGES
        matrix, x_row, at = _place(first + turn, ahead, num_turns, num_rows, EXPERTS, BK)
        mbarrier.expect(bars.index(then), BYTES, pred=more)
        tma.async_copy_global_to_shared(
            w, [matrix * PARTS, n0, at - shift], bars.index(then), w_parts.index(then), pred=more
        )
        tma.async_copy_global_to_shared(x, [x_row, at - shift], bars.index(then), x_tiles.index(then), pred=more)
        its = scales + (at // BK).to(gl.int64) * scale_stride + matrix * PARTS * columns
        async_copy.async_copy_global_to_shared(ring.index(then), its + of_tile, mask=here & more)
        async_copy.commit_group()
        ahead = _matrix_of(first + turn + 1, stop, experts, num_turns, EXPERTS)
        part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
        acc += part * scale[:, None]
    async_copy.wait_group(0)
    sums.store(acc)
    _finish(
        sums, bias, out, experts, row_weights, num_rows, columns, n0, split, used, first, stop, num_turns,
        PARTS, HALF, BM, WARPS, HAS_BIAS, EXPERTS,
    )  # fmt: skip


@gluon.jit
def _widen(byte, dtype: gl.constexpr):
    """Return in ``dtype`` what bytes mean as e4m3: exact, but for NaN."""
    if dtype == gl.float16:
        return gl.inline_asm_elementwise(
            "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
            "=r,=r,r", [byte], dtype=gl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        # sign and magnitude move to where a bfloat16 has them; its exponent counts from 120 less
        return gl.inline_asm_elementwise(
            """
            { .reg .b32 a, b, c, d, e;
              mov.b32 e, 0x7b807b80;
              prmt.b32 a, $2, 0, 0x1404;
              prmt.b32 b, $2, 0, 0x3424;
              shr.u32 c, a, 4;
              shr.u32 d, b, 4;
              and.b32 a, a, 0x80008000;
              and.b32 b, b, 0x80008000;
              lop3.b32 a, c, 0x07f007f0, a, 0xEA;
              lop3.b32 b, d, 0x07f007f0, b, 0xEA;
              mul.rn.bf16x2 $0, a, e;
              mul.rn.bf16x2 $1, b, e; }
            """,
            "=r,=r,r", [byte], dtype=gl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip


@gluon.jit
def _finish(
    sums, bias, out, experts, row_weights, num_rows, columns, n0, split, used, first, stop, num_turns,
    PARTS: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr, HAS_BIAS: gl.constexpr,
    EXPERTS: gl.constexpr,
):  # fmt: skip
    """Write a program's sums to its rows of ``out``: gated, with their bias, or weighted."""
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, WARPS], [0, 1])
    dtype: gl.constexpr = out.dtype.element_ty
    n = n0 + gl.arange(0, HALF, layout=gl.SliceLayout(1, flat))
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, flat))
    value = sums.slice(0, HALF, dim=0).load(flat)
    if PARTS == 2:
        value = value / (1.0 + gl.exp(-value)) * sums.slice(HALF, HALF, dim=0).load(flat)
    if HAS_BIAS:
        value += gl.load(bias + n, mask=(n < columns) & (split == 0), other=0.0).to(gl.float32)[:, None]
    if EXPERTS == "each":
        expert = _matrix_of(first, stop, experts, num_turns, EXPERTS)
        weight = gl.load(row_weights + expert * num_rows + m, mask=(m < num_rows) & used, other=0.0)[None, :]
        value = gl.where(weight != 0.0, weight * value, 0.0)
    to = out + ((split * num_rows + m).to(gl.int64)[None, :] * columns + n[:, None])
    gl.store(to, value.to(dtype), mask=(n < columns)[:, None] & ((m < num_rows) & used)[None, :])


@gluon.jit
def _matrix_of(turn, stop, experts, num_turns, EXPERTS: gl.constexpr):
    """Return which expert's matrices the turn reads: 0 where there are none, or past the last turn."""
    if EXPERTS is None:
        return 0
    else:
        return gl.load(experts + turn // num_turns, mask=turn < stop, other=0, cache_modifier=".cg")


@gluon.jit
def _place(turn, matrix, num_turns, num_rows, EXPERTS: gl.constexpr, BK: gl.constexpr):
    """Return the matrix that a turn reads, the first row of ``x``, and where in K it stands."""
    if EXPERTS is None:
        return matrix, 0, turn * BK
    else:
        index = turn // num_turns
        at = (turn - index * num_turns) * BK
        return matrix, index * num_rows if EXPERTS == "all" else 0, at
