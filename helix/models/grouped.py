"""Products of many rows with the experts that they chose, for Hopper: at the tensor cores' speed.

The pairs of an expert are copied together into blocks of 128 rows, so that every tile is one box in memory, and the
result of a product is the next one's operand as it is. Persistent programs take tiles of a block: 128 rows times twice
128 of its expert's rows, of gate and up or of down. One warp asks for what the tensor memory engine brings, and two
groups of four warps multiply, each with half of the rows; a group whose rows are padding only waits. No barrier holds
the groups together, so that one multiplies while the other stores.

How many blocks there are is data on the device: what is launched depends on sizes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from parallel.device import capability

from .quantized import Matrix

BLOCK_ROWS = 128
BN, BK = 128, 64
STAGES = 4
REGISTERS = 232  # a thread that multiplies
FETCH_REGISTERS = 24
COPIED_ROWS = 16  # rows of a program that copies pairs together
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    x, counts, queues, gathered, place, expert_of, rows_of, num_blocks, num_rows,
    HELD: tl.constexpr, HELD_PAD: tl.constexpr, CHOSEN: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copy ROWS pairs of a block together, note where each went, and of a block its expert and how many it has."""
    block, first = tl.program_id(0), tl.program_id(1) * ROWS
    e = tl.arange(0, HELD_PAD)
    count = tl.load(counts + e, mask=e < HELD, other=0)
    blocks = (count + BLOCK - 1) // BLOCK
    stop = tl.cumsum(blocks, 0)
    expert = tl.sum((stop <= block).to(tl.int32), 0)
    its = e == expert
    start = (block - tl.sum(tl.where(its, stop - blocks, 0), 0)) * BLOCK
    rest = tl.sum(tl.where(its, count, 0), 0) - start
    if (block == 0) & (first == 0):
        tl.store(num_blocks, tl.sum(blocks, 0))
    if (expert < HELD) & (first < rest):
        if first == 0:
            tl.store(expert_of + block, expert)
            tl.store(rows_of + block, tl.minimum(rest, BLOCK))
        i, h = first + tl.arange(0, ROWS), tl.arange(0, H_PAD)
        real = i < rest
        pair = tl.load(queues + expert.to(tl.int64) * num_rows + start + i, mask=real, other=0).to(tl.int64)
        to = block.to(tl.int64) * BLOCK + i
        tl.store(place + pair, to.to(tl.int32), mask=real)
        there = real[:, None] & (h < H)[None, :]
        row = tl.load(x + (pair // CHOSEN)[:, None] * H + h[None, :], mask=there, other=0.0)
        tl.store(gathered + to[:, None] * H + h[None, :], row, mask=there)


@gluon.jit
def _fetch(
    x, w, x_s, w_s, full, free, expert_of, num_blocks, tiles, expert_rows, second, DEPTH: gl.constexpr,
    STEP: gl.constexpr,
):  # fmt: skip
    """The warp that asks for both halves of a block's rows and two boxes of its expert's, turn by turn."""
    STAGES: gl.constexpr = full.shape[0]
    HALF: gl.constexpr = x_s.shape[1]
    BN: gl.constexpr = w_s.shape[1]
    BK: gl.constexpr = w_s.shape[2]
    BYTES: gl.constexpr = 2 * (HALF + BN) * BK * x.dtype.primitive_bitwidth // 8
    turn = gl.program_id(0) * 0
    for tile in range(gl.program_id(0), gl.load(num_blocks) * tiles, gl.num_programs(0)):
        block = tile // tiles
        row = gl.load(expert_of + block) * expert_rows + tile % tiles * STEP
        for k in range(DEPTH):
            stage = turn % STAGES
            bar = full.index(stage)
            mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(x, [block * 2 * HALF, k * BK], bar, x_s.index(2 * stage))
            tma.async_copy_global_to_shared(x, [block * 2 * HALF + HALF, k * BK], bar, x_s.index(2 * stage + 1))
            tma.async_copy_global_to_shared(w, [row, k * BK], bar, w_s.index(2 * stage))
            tma.async_copy_global_to_shared(w, [row + second, k * BK], bar, w_s.index(2 * stage + 1))
            turn += 1


@gluon.jit
def _multiply(
    out, x_s, w_s, full, free, rows_of, num_blocks, tiles, columns, PART: gl.constexpr, DEPTH: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply one half of a block's rows, and gate or store the results."""
    STAGES: gl.constexpr = full.shape[0]
    HALF: gl.constexpr = x_s.shape[1]
    BN: gl.constexpr = w_s.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    m = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    n = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    turn = gl.program_id(0) * 0
    for tile in range(gl.program_id(0), gl.load(num_blocks) * tiles, gl.num_programs(0)):
        block = tile // tiles
        rows = gl.load(rows_of + block)
        a = gl.zeros([HALF, BN], gl.float32, layout=layout)
        b = gl.zeros([HALF, BN], gl.float32, layout=layout)
        if rows > PART * HALF:
            for k in range(DEPTH):
                stage = turn % STAGES
                mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
                mine = x_s.index(2 * stage + PART)
                a = warpgroup_mma(mine, w_s.index(2 * stage).permute((1, 0)), a, is_async=True)
                b = warpgroup_mma(mine, w_s.index(2 * stage + 1).permute((1, 0)), b, is_async=True)
                a, b = warpgroup_mma_wait(num_outstanding=2, deps=[a, b])
                mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), count=1, pred=k > 0)
                turn += 1
            a, b = warpgroup_mma_wait(num_outstanding=0, deps=[a, b])
            mbarrier.arrive(free.index((turn + STAGES - 1) % STAGES), count=1)
            to = out + (block.to(gl.int64) * 2 * HALF + m)[:, None] * columns
            there = (m < rows)[:, None]
            if GATED:
                column = tile % tiles * BN + n
                value = a / (1.0 + gl.exp(-a)) * b
                gl.store(to + column[None, :], value.to(out.dtype.element_ty), mask=there & (column < columns)[None, :])
            else:
                column = tile % tiles * 2 * BN + n
                gl.store(to + column[None, :], a.to(out.dtype.element_ty), mask=there & (column < columns)[None, :])
                column += BN
                gl.store(to + column[None, :], b.to(out.dtype.element_ty), mask=there & (column < columns)[None, :])
        else:
            for _ in range(DEPTH):
                stage = turn % STAGES
                mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
                mbarrier.arrive(free.index(stage), count=1)
                turn += 1


@gluon.jit
def _grouped_kernel(
    x, w, out, expert_of, rows_of, num_blocks, tiles, expert_rows, second, columns,
    HALF: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr, GATED: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x.dtype
    x_s = gl.allocate_shared_memory(dtype, [2 * STAGES, HALF, BK], x.layout)
    w_s = gl.allocate_shared_memory(dtype, [2 * STAGES, BN, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=2)
    gl.warp_specialize(
        [
            (_multiply, (out, x_s, w_s, full, free, rows_of, num_blocks, tiles, columns, 0, DEPTH, GATED)),
            (_multiply, (out, x_s, w_s, full, free, rows_of, num_blocks, tiles, columns, 1, DEPTH, GATED)),
            (_fetch, (
                x, w, x_s, w_s, full, free, expert_of, num_blocks, tiles, expert_rows, second, DEPTH,
                BN if GATED else 2 * BN,
            )),
        ],
        [4, 1],
        [REGISTERS, FETCH_REGISTERS],
    )  # fmt: skip


def supports(x: torch.Tensor, *experts: Matrix) -> bool:
    """Return whether x [R, h] times these experts can go through the kernel: a Hopper GPU, 16 bits, rows aligned."""
    aligned = all(isinstance(w, torch.Tensor) and w.is_contiguous() and w.shape[-1] % 8 == 0 for w in experts)
    return aligned and x.is_cuda and capability(x.device)[0] == 9 and x.dtype in _ELEMENTS


def mix_blocks(
    x: torch.Tensor, counts: torch.Tensor, queues: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, chosen: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each pair's expert makes of its row, unweighted: [places, h], and the place of each pair.

    Args:
        x: [R, h], packed.
        counts: [E] int32, pairs of each of this rank's experts.
        queues: [E, R] int32, these pairs: row * chosen + which of the row's experts.
        gate_up: [E, 2 F, h], the gate's rows first.
        down: [E, h, F].
        chosen: experts that a row chooses.

    Returns:
        The results, and [R * chosen] int32; places of pairs of other ranks' experts are not written.
    """
    (num_rows, hidden_size), (num_held, _, units) = x.shape, down.shape
    num_pairs = num_rows * chosen
    blocks = min(num_pairs, num_pairs // BLOCK_ROWS + num_held)  # as many as there could be
    gathered, hidden = x.new_empty((blocks * BLOCK_ROWS, hidden_size)), x.new_empty((blocks * BLOCK_ROWS, units))
    place, num_blocks = counts.new_empty(num_pairs), counts.new_empty(1)
    expert_of, rows_of = counts.new_empty(blocks), counts.new_empty(blocks)
    _gather_kernel[(blocks, BLOCK_ROWS // COPIED_ROWS)](
        x, counts, queues, gathered, place, expert_of, rows_of, num_blocks, num_rows,
        HELD=num_held, HELD_PAD=triton.next_power_of_2(num_held), CHOSEN=chosen, H=hidden_size,
        H_PAD=triton.next_power_of_2(hidden_size), BLOCK=BLOCK_ROWS, ROWS=COPIED_ROWS, num_warps=8,
    )  # fmt: skip
    which = expert_of, rows_of, num_blocks
    _launch(gathered, gate_up, hidden, which, gated=True)
    _launch(hidden, down, gathered, which, gated=False)  # what was gathered is not needed any more
    return gathered, place


def _launch(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    which: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    gated: bool,
) -> None:
    """Multiply blocks of x [places, K] with their experts' w [E, N, K], into out [places, N], or N / 2 where gated."""
    half, columns = BLOCK_ROWS // 2, out.shape[1]
    tiles = -(-columns // (BN if gated else 2 * BN))
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    _grouped_kernel[(processors,)](
        _boxes(x, half), _boxes(w.flatten(0, 1), BN), out, *which, tiles, w.shape[1], columns if gated else BN, columns,
        HALF=half, BN=BN, BK=BK, DEPTH=-(-x.shape[1] // BK), GATED=gated, STAGES=STAGES, REGISTERS=REGISTERS,
        FETCH_REGISTERS=FETCH_REGISTERS, num_warps=4,
    )  # fmt: skip


def _boxes(x: torch.Tensor, rows: int) -> TensorDescriptor:
    block = [rows, BK]
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
