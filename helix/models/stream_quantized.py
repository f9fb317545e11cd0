"""The kernel that streams quantised weights past few rows: tiles of 8 bits are widened in registers, exactly.

It computes what ``stream_weights`` does, in the same forms. A turn is one block of columns of the whole matrix, so that
each row has one scale in it: the turn's products are multiplied by it, whatever the number of rows, and a row is
computed alike in all of them. The first turn begins where the slice's block does, and both operands are read as zero
before the slice.

One warp of a program asks for tiles of weights and scales, as many as the stages hold before it waits for the kernel
that makes x; the others widen and multiply. Tiles of x may have fewer stages. A thread reads four bytes of a row as one
word, which become two operands of two neighbours each (``quantized`` says in which order columns are stored).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .stream_weights import finish, matrix_of, place, weights_of_rows


@gluon.jit
def _turns_of(num_turns, num_experts, split, splits, EXPERTS: gl.constexpr):
    """Return a program's first turn, how many it takes, and whether it computes anything."""
    if EXPERTS == "each":
        used = split < gl.load(num_experts, cache_modifier=".cg")
        return split * num_turns, gl.where(used, num_turns, 0), used
    else:
        total = num_turns
        if EXPERTS == "all":
            total *= gl.load(num_experts, cache_modifier=".cg")
        first = split * total // splits
        return first, (split + 1) * total // splits - first, True


@gluon.jit
def _ask_weights(w, scales, bar, w_parts, scale_parts, stage, matrix, n0, at, begin, columns):
    """Ask for one turn's tile of weights and its scales."""
    PARTS: gl.constexpr = w.block_shape[0]
    BK: gl.constexpr = w.block_shape[2]
    tma.async_copy_global_to_shared(w, [matrix * PARTS, n0, at - begin], bar, w_parts.index(stage))
    for part in gl.static_range(PARTS):
        row = (matrix * PARTS + part) * columns + n0
        tma.async_copy_global_to_shared(scales, [at // BK, row], bar, scale_parts.index(stage * PARTS + part))


@gluon.jit
def _fetch(
    w, x, scales, w_parts, x_tiles, scale_parts, full, free, shift, begin, experts, num_experts, num_rows, columns,
    num_turns, splits, EXPERTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warp that asks for the tiles of each turn, once their stage is free."""
    n0, split = gl.program_id(0) * w.block_shape[1], gl.program_id(1)
    STAGES: gl.constexpr = full.shape[0]
    X_STAGES: gl.constexpr = x_tiles.shape[0]
    BK: gl.constexpr = w.block_shape[2]
    X_BYTES: gl.constexpr = x.block_shape[0] * BK * x.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = w.block_shape[0] * w.block_shape[1] * (BK + 4) + X_BYTES
    first, count, _used = _turns_of(num_turns, num_experts, split, splits, EXPERTS)
    stop = first + count
    early = gl.minimum(count, STAGES)
    own = split * 0
    if EXPERTS == "each":
        own = gl.load(experts + split, cache_modifier=".cg")  # anything where none is in use
    for i in range(early):
        matrix = own if EXPERTS == "each" else matrix_of(first + i, stop, experts, num_turns, EXPERTS)
        matrix, x_row, at = place(first + i, matrix, num_turns, num_rows, EXPERTS, BK)
        mbarrier.expect(full.index(i), BYTES)
        _ask_weights(w, scales, full.index(i), w_parts, scale_parts, i, matrix, n0, at, begin, columns)
    if PDL and EXPERTS != "each":
        gdc_wait()
    for i in range(gl.minimum(count, X_STAGES)):
        matrix, x_row, at = place(first + i, 0, num_turns, num_rows, EXPERTS, BK)
        tma.async_copy_global_to_shared(x, [x_row, at - shift], full.index(i), x_tiles.index(i))
    for done in range(count - X_STAGES):
        stage, i = done % STAGES, done + STAGES
        matrix = own if EXPERTS == "each" else matrix_of(first + i, stop, experts, num_turns, EXPERTS)
        matrix, x_row, at = place(first + i, matrix, num_turns, num_rows, EXPERTS, BK)
        mbarrier.wait(free.index(stage), (done // STAGES) & 1)
        if i < count:
            mbarrier.expect(full.index(stage), BYTES)
            _ask_weights(w, scales, full.index(stage), w_parts, scale_parts, stage, matrix, n0, at, begin, columns)
        i = done + X_STAGES
        matrix, x_row, at = place(first + i, 0, num_turns, num_rows, EXPERTS, BK)
        tma.async_copy_global_to_shared(x, [x_row, at - shift], full.index(i % STAGES), x_tiles.index(i % X_STAGES))


@gluon.jit
def _multiply(
    w_parts, w_tiles, x_tiles, scale_tiles, full, free, bias, out, experts, num_experts, row_weights, num_rows, columns,
    num_turns, splits, PARTS: gl.constexpr, HAS_BIAS: gl.constexpr, EXPERTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warps that widen and multiply, turn by turn, and store the sums."""
    STAGES: gl.constexpr = full.shape[0]
    BN: gl.constexpr = w_tiles.shape[1]
    BM: gl.constexpr = x_tiles.shape[1]
    n0, split = gl.program_id(0) * (BN // PARTS), gl.program_id(1)
    WARPS: gl.constexpr = BN // 16
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BM, 16])
    _first, count, used = _turns_of(num_turns, num_experts, split, splits, EXPERTS)
    weight = 0.0
    if EXPERTS == "each":
        weight = weights_of_rows(experts, row_weights, num_rows, split, used, BM, WARPS)
    nothing = gl.zeros([BN, BM], gl.float32, layout=layout)
    acc = nothing
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        wide = _widen(w_tiles.index(stage), gl.DotOperandLayout(0, layout, 2), x_tiles.dtype)
        x_tile = x_tiles.index(i % x_tiles.shape[0]).permute((1, 0))
        part = warpgroup_mma(wide, x_tile, nothing, use_acc=False, is_async=True)
        scale = scale_tiles.index(stage).load(gl.SliceLayout(1, layout))
        # the operand in registers is kept as well: it is read until then
        part, wide = warpgroup_mma_wait(num_outstanding=0, deps=[part, wide])
        mbarrier.arrive(free.index(stage), count=1)
        acc += part * scale[:, None]
    if PDL and EXPERTS != "each":
        gdc_wait()  # a kernel that ends without waiting would let the next one pass the one before
    sums = w_parts._reinterpret(gl.float32, [BN, BM], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    sums.store(acc)
    finish(
        sums, bias, out, weight, num_rows, columns, n0, split, used, PARTS, BN // PARTS, BM, WARPS, HAS_BIAS, EXPERTS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["shift", "begin", "num_rows", "num_turns", "splits"])
def stream_quantized_kernel(
    w, x, scales, shift, begin, bias, out, experts, num_experts, row_weights, num_rows, columns, num_turns, splits,
    BM: gl.constexpr, STAGES: gl.constexpr, X_STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, EXPERTS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Do what ``stream_weights_kernel`` does for matrices of 8 bits.

    ``w`` describes bytes as they are stored, of which the first block has ``begin`` before the first; ``scales``
    describes [num_turns, rows of all matrices] in tiles of a part's rows. ``x`` lacks ``shift`` columns of that block,
    a multiple of 8, since copies of tiles begin at multiples of 16 bytes.
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
    plain: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_parts = gl.allocate_shared_memory(w.dtype, [STAGES, PARTS, HALF, BK], w.layout)
    w_tiles = w_parts._reinterpret(w.dtype, [STAGES, BN, BK], plain)
    x_tiles = gl.allocate_shared_memory(x.dtype, [X_STAGES, BM, BK], x.layout)
    scale_parts = gl.allocate_shared_memory(gl.float32, [STAGES * PARTS, 1, HALF], scales.layout)
    scale_tiles = scale_parts._reinterpret(gl.float32, [STAGES, BN], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=1)
    gl.warp_specialize(
        [
            (_multiply, (
                w_parts, w_tiles, x_tiles, scale_tiles, full, free, bias, out, experts, num_experts, row_weights,
                num_rows, columns, num_turns, splits, PARTS, HAS_BIAS, EXPERTS, PDL,
            )),
            (_fetch, (
                w, x, scales, w_parts, x_tiles, scale_parts, full, free, shift, begin, experts, num_experts, num_rows,
                columns, num_turns, splits, EXPERTS, PDL,
            )),
        ],
        [1],
        [24],  # a thread's
    )  # fmt: skip


@gluon.constexpr_function
def _words(warps: int) -> gl.DistributedLinearLayout:
    """Return the layout of a tile's bytes [16 * warps, 128]: as wgmma's operand, but four of a row's are a word."""
    registers = [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    its_warps = [[16 << bit, 0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, its_warps, [], [16 * warps, 128])


@gluon.jit
def _widen(tile, operand: gl.constexpr, dtype: gl.constexpr):
    """Return in ``dtype`` what a tile's bytes mean as e4m3, columns in order: exact, but for NaN."""
    BN: gl.constexpr = tile.shape[0]
    byte = tile.load(_words(BN // 16))
    if dtype == gl.float16:
        wide = gl.inline_asm_elementwise(
            """
            { .reg .b16 a, b;
              .reg .b32 c, d;
              mov.b32 {a, b}, $2;
              cvt.rn.f16x2.e4m3x2 c, a;
              cvt.rn.f16x2.e4m3x2 d, b;
              prmt.b32 $0, c, d, 0x5410;
              prmt.b32 $1, c, d, 0x7632; }
            """,
            "=r,=r,r", [byte], dtype=gl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        # sign and magnitude move to where a bfloat16 has them; its exponent counts from 120 less
        wide = gl.inline_asm_elementwise(
            """
            { .reg .b32 a, b, c, d, e;
              mov.b32 e, 0x7b807b80;
              shl.b32 a, $2, 8;
              shl.b32 b, $2, 4;
              shr.u32 c, $2, 4;
              and.b32 a, a, 0x80008000;
              and.b32 d, $2, 0x80008000;
              lop3.b32 a, b, 0x07f007f0, a, 0xEA;
              lop3.b32 d, c, 0x07f007f0, d, 0xEA;
              mul.rn.bf16x2 $0, a, e;
              mul.rn.bf16x2 $1, d, e; }
            """,
            "=r,=r,r", [byte], dtype=gl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    # bytes are columns 0, 8, 1, 9 of a group, and leave as 0, 1 and 8, 9
    wide = wide.reshape([BN, 8, 4, 2, 2]).permute((0, 1, 3, 2, 4)).reshape([BN, 128])
    return gl.convert_layout(wide, operand, assert_trivial=True)
