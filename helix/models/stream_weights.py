"""The kernel that streams weights of 16 bits past few rows, and what that for quantised ones shares with it.

What they compute, and why like this, is said in ``linear.py``, which launches them.

    EXPERTS   grid (y)            a turn reads                        x                       what is written
    None      splits of K         matrix 0, BK columns                its columns             summands [splits, R, N]
    "each"    experts in use      its expert's matrices               the same for all        weighted units [J, R, F]
    "all"     splits of all K     the turn's expert's matrix          that expert's rows      summands [splits, R, h]
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit(do_not_specialize=["num_rows", "num_turns", "splits", "beside", "beside_columns"])
def stream_weights_kernel(
    w, x, w_beside, x_beside, bias, out, experts, num_experts, row_weights, num_rows, columns, num_turns, splits,
    beside, beside_columns,
    BM: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, EXPERTS: gl.constexpr, BESIDE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """out[split, m, n] = x[m, :] . w[0, n, :] over the split's part of K; or silu of that times x[m, :] . w[1, n, :].

    ``w`` describes [1 or 2, N, K] in tiles of BN rows together, ``x`` [R, K] in tiles of BM; a turn takes one of each.
    What lies outside the tensors is read as zero.

    EXPERTS "each": ``w`` describes the matrices of all experts, and each split is an expert in use, whose products
    are weighted row by row. EXPERTS "all": K goes through all experts in use, and ``x`` describes [their rows, K].

    BESIDE: experts that every row goes through come first, of which ``w_beside`` and ``x_beside`` are. With "each"
    ``beside`` splits before the others take their tiles, and ``out`` begins with their units [R, ``beside_columns``];
    with "all" they are ``beside`` turns.
    """
    EACH: gl.constexpr = EXPERTS == "each"
    PARTS: gl.constexpr = w.block_shape[0]
    HALF: gl.constexpr = w.block_shape[1]
    BN: gl.constexpr = PARTS * HALF
    WARPS: gl.constexpr = BN // 16
    BK: gl.constexpr = w.block_shape[2]
    BYTES: gl.constexpr = (BN + BM) * BK * w.dtype.primitive_bitwidth // 8
    n0, split = gl.program_id(0) * HALF, gl.program_id(1)
    if EACH and BESIDE:
        split -= beside  # below 0: those beside, whose weights depend on nothing that the step computes
        n0 += gl.where(split < 0, (split + beside) * gl.num_programs(0) * HALF, 0)
    if PDL:
        if EACH and (not BESIDE or split >= 0):
            gdc_wait()  # first: the kernel after this one may then read which experts are in use before it waits
        gdc_launch_dependents()
    own = 0
    if EACH:
        own = gl.load(experts + gl.maximum(split, 0), cache_modifier=".cg")  # anything where none is in use
        used = split < gl.load(num_experts, cache_modifier=".cg")
        if BESIDE:
            used = gl.where(split < 0, n0 < beside_columns, used)
        first, count = 0, gl.where(used, num_turns, 0)
    else:
        total, used = num_turns, True
        if EXPERTS == "all":
            total *= gl.load(num_experts, cache_modifier=".cg")
        if BESIDE:
            total += beside
        first = split * total // splits
        count = (split + 1) * total // splits - first
        if BESIDE:
            first -= beside  # turns of those beside are counted below 0
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
        matrix = own if EACH else matrix_of(turn, stop, experts, num_turns, EXPERTS)
        mbarrier.expect(bars.index(s), BYTES, pred=s < count)
        _ask_weights(
            w, w_beside, w_parts.index(s), bars.index(s), matrix, n0, turn, split, beside, num_turns, s < count,
            EXPERTS, BESIDE,
        )  # fmt: skip
    if PDL and (not EACH or (BESIDE and split < 0)):
        gdc_wait()
    for s in gl.static_range(STAGES):
        _ask_rows(
            x, x_beside, x_tiles.index(s), bars.index(s), first + s, beside, num_turns, num_rows, s < count, EXPERTS,
            BESIDE,
        )  # fmt: skip
    weight = 0.0
    if EACH:
        weight = weights_of_rows(experts, row_weights, num_rows, split, used & (split >= 0), BM, WARPS)
        if BESIDE:
            weight = gl.where(split < 0, 1.0, weight)
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BM, 16])
    acc = gl.zeros([BN, BM], gl.float32, layout=layout)
    ahead = own if EACH else matrix_of(stop, stop, experts, num_turns, EXPERTS)
    for i in range(count):
        now = i % STAGES
        mbarrier.wait(bars.index(now), (i // STAGES) & 1)
        acc = warpgroup_mma(w_tiles.index(now), x_tiles.index(now).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        # the products of the turn before are done: its stage takes the tiles of the turn that comes next there
        later = i - 1 + STAGES
        more = (i > 0) & (later < count)
        then, turn = later % STAGES, first + later
        mbarrier.expect(bars.index(then), BYTES, pred=more)
        _ask_weights(
            w, w_beside, w_parts.index(then), bars.index(then), ahead, n0, turn, split, beside, num_turns, more,
            EXPERTS, BESIDE,
        )  # fmt: skip
        _ask_rows(
            x, x_beside, x_tiles.index(then), bars.index(then), turn, beside, num_turns, num_rows, more, EXPERTS, BESIDE
        )
        if not EACH:  # asked for a turn early
            ahead = matrix_of(turn + 1, stop, experts, num_turns, EXPERTS)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])

    sums.store(acc)
    if EACH and BESIDE:
        out += gl.where(split < 0, 0, num_rows * beside_columns)
        columns = gl.where(split < 0, beside_columns, columns)
        split = gl.maximum(split, 0)
    finish(
        sums, bias, out, weight, num_rows, columns, n0, split, used, PARTS, HALF, BM, WARPS, HAS_BIAS, EXPERTS,
    )  # fmt: skip


@gluon.jit
def _ask_weights(
    w, w_beside, tile, bar, matrix, n0, turn, split, beside, num_turns, pred,
    EXPERTS: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """Ask for a turn's tile of weights."""
    PARTS: gl.constexpr = w.block_shape[0]
    BK: gl.constexpr = w.block_shape[2]
    if BESIDE:
        theirs = split < 0 if EXPERTS == "each" else turn < 0
        at = turn * BK if EXPERTS == "each" else (turn + beside) * BK
        tma.async_copy_global_to_shared(w_beside, [0, n0, at], bar, tile, pred=pred & theirs)
        pred = pred & (theirs == 0)
    matrix, _, at = place(turn, matrix, num_turns, 0, EXPERTS, BK)
    tma.async_copy_global_to_shared(w, [matrix * PARTS, n0, at], bar, tile, pred=pred)


@gluon.jit
def _ask_rows(
    x, x_beside, tile, bar, turn, beside, num_turns, num_rows, pred, EXPERTS: gl.constexpr, BESIDE: gl.constexpr
):
    """Ask for a turn's tile of rows."""
    BK: gl.constexpr = x.block_shape[1]
    if BESIDE and EXPERTS == "all":
        tma.async_copy_global_to_shared(x_beside, [0, (turn + beside) * BK], bar, tile, pred=pred & (turn < 0))
        pred = pred & (turn >= 0)
    _, row, at = place(turn, 0, num_turns, num_rows, EXPERTS, BK)
    tma.async_copy_global_to_shared(x, [row, at], bar, tile, pred=pred)


@gluon.jit
def weights_of_rows(experts, row_weights, num_rows, split, used, BM: gl.constexpr, WARPS: gl.constexpr):
    """Return the weights [BM] of a split's expert, for ``finish``: asked for before the products, not after."""
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, gl.BlockedLayout([1, 1], [32, 1], [1, WARPS], [0, 1])))
    expert = gl.load(experts + split, mask=used, other=0, cache_modifier=".cg")
    return gl.load(row_weights + expert * num_rows + m, mask=(m < num_rows) & used, other=0.0)


@gluon.jit
def finish(
    sums, bias, out, weight, num_rows, columns, n0, split, used,
    PARTS: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr, HAS_BIAS: gl.constexpr,
    EXPERTS: gl.constexpr,
):  # fmt: skip
    """Write a program's sums to its rows of ``out``: gated, with their bias, or times ``weights_of_rows``."""
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
        value = gl.where((weight != 0.0)[None, :], weight[None, :] * value, 0.0)
    to = out + ((split * num_rows + m).to(gl.int64)[None, :] * columns + n[:, None])
    gl.store(to, value.to(dtype), mask=(n < columns)[:, None] & ((m < num_rows) & used)[None, :])


@gluon.jit
def matrix_of(turn, stop, experts, num_turns, EXPERTS: gl.constexpr):
    """Return which expert's matrices the turn reads: 0 where there are none, before the first turn or past the last."""
    if EXPERTS is None:
        return 0
    else:
        return gl.load(experts + turn // num_turns, mask=(turn >= 0) & (turn < stop), other=0, cache_modifier=".cg")


@gluon.jit
def place(turn, matrix, num_turns, num_rows, EXPERTS: gl.constexpr, BK: gl.constexpr):
    """Return the matrix that a turn reads, the first row of ``x``, and where in K it stands."""
    if EXPERTS is None:
        return matrix, 0, turn * BK
    else:
        index = turn // num_turns
        at = (turn - index * num_turns) * BK
        return matrix, index * num_rows if EXPERTS == "all" else 0, at
