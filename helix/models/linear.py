"""Projections of few rows: a kernel that streams the weights at memory speed, and the library elsewhere.

A decode step's projections are bound by the bytes of their weights, and those bytes depend on nothing that the step
computes. So the kernel asks for as many as its stages hold before it waits for the kernel that makes its rows
(programmatic dependent launch): memory is busy while the step waits for other ranks.

A program takes 64 rows of the weights (the tensor core's M) and a part of K, and multiplies them with all rows at once.
Where K is split, the parts are summed by whoever reads them: the all-reduce, or the kernel that rotates.

Experts go through the same kernel. With few rows it is the bytes of the experts in use that take the time, so each of
them is multiplied with all rows, and its units are zero in the rows that did not choose it: nothing needs to be sorted,
and going back to the hidden size is one sum over the units of all experts in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel.device import capability

from .quantized import Matrix, Quantized, product

MAX_ROWS = 64
STAGE_BYTES = 147456  # one program a processor; memory needs some 10 MB in flight to be busy
BN, BK = 64, 128
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _stream_weights_kernel(
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

    flat: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    dtype: gl.constexpr = out.dtype.element_ty
    n = n0 + gl.arange(0, HALF, layout=gl.SliceLayout(1, flat))
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, flat))
    sums.store(acc)
    value = sums.slice(0, HALF, dim=0).load(flat)
    if PARTS == 2:
        value = value / (1.0 + gl.exp(-value)) * sums.slice(HALF, HALF, dim=0).load(flat)
    if HAS_BIAS:
        value += gl.load(bias + n, mask=(n < columns) & (split == 0), other=0.0).to(gl.float32)[:, None]
    if EACH:
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


@cache
def _processors(device: torch.device) -> int:
    """Return the number of processors of a GPU that the kernel runs on (Hopper), else 0."""
    if capability(device)[0] != 9:
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _tiles(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def choose_splits(columns: int, turns: int, processors: int) -> int:
    """Return how many parts K, which takes so many turns, is cut into, so that programs fill the GPU."""
    return max(1, min(processors // -(-columns // BN), turns // 2))


@dataclass(frozen=True)
class ExpertsInUse:
    """The experts of this rank that a step's rows chose, without a look from the host.

    Attributes:
        ids: [J] int32, which they are, ascending; J is as many as there could be. Only the first ``count`` are read.
        count: [1] int32.
        row_weights: [E, R] float32, the weight of each of this rank's experts in each row; 0 where it was not chosen.
    """

    ids: torch.Tensor
    count: torch.Tensor
    row_weights: torch.Tensor


def _stream(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gated: bool,
    pdl: bool,
    splits: int,
    rows: int,
    experts: ExpertsInUse | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """Launch the kernel for w [1 or E, 1 or 2 times N, K]: [S, R, N], float32 where S > 1 and these are summands, or
    where it is to be ``exact``.
    """
    parts = 2 if gated else 1
    w = w.reshape(-1, w.shape[-2] // parts, w.shape[-1])
    columns, depth = w.shape[1:]
    bm, half = max(8, triton.next_power_of_2(rows)), BN // parts
    each = gated and experts is not None
    dtype = x.dtype if (splits == 1 or each) and not exact else torch.float32
    out = torch.empty((splits, rows, columns), dtype=dtype, device=x.device)
    ids, count, row_weights = (x, x, x) if experts is None else (experts.ids, experts.count, experts.row_weights)
    _stream_weights_kernel[(-(-columns // half), splits)](
        _tiles(w, [parts, half, BK]), _tiles(x, [bm, BK]), x if bias is None else bias, out, ids, count, row_weights,
        rows, columns, -(-depth // BK),
        BM=bm, STAGES=STAGE_BYTES // ((BN + bm) * BK * x.element_size()), SPLITS=1 if each else splits,
        HAS_BIAS=bias is not None, EXPERTS=None if experts is None else "each" if each else "all",
        PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def can_stream(x: torch.Tensor, w: Matrix) -> bool:
    """Return whether x [R, K] times w [N, K] transposed goes through the kernel.

    It does for few rows of a 2-byte dtype on a GPU with the kernel's instructions, aligned to what its copies need.
    """
    if isinstance(w, Quantized):
        return False
    if not (x.is_cuda and x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.dtype in _ELEMENTS):
        return False
    aligned = all(t.stride(-1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, w))
    return aligned and _processors(x.device) > 0


def split_linear(
    x: torch.Tensor, w: Matrix, bias: torch.Tensor | None = None, *, pdl: bool = False, exact: bool = False
) -> torch.Tensor:
    """Return summands of x [R, K] times w [N, K] transposed, plus bias [N]: [S, R, N].

    The result is their sum over S; they are float32 where S > 1, and in x's dtype where S is 1. Where ``can_stream``
    holds, ``exact`` ones are float32 always.
    """
    if isinstance(w, torch.Tensor) and can_stream(x, w):
        splits = choose_splits(w.shape[0], -(-x.shape[1] // BK), _processors(x.device))
        return _stream(x, w, bias, gated=False, pdl=pdl, splits=splits, rows=x.shape[0], exact=exact)
    return product(x, w, bias).unsqueeze(0)


def linear(x: torch.Tensor, w: Matrix, *, pdl: bool = False) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed: [R, N] in x's dtype, summed in float32."""
    if isinstance(w, torch.Tensor) and can_stream(x, w):
        return _stream(x, w, None, gated=False, pdl=pdl, splits=1, rows=x.shape[0])[0]
    return product(x, w)


def gated_linear(x: torch.Tensor, gate_up: Matrix, *, pdl: bool = False) -> torch.Tensor:
    """Return silu(x gate^T) * (x up^T): [R, F] for gate_up [2 F, K], the gate's rows first."""
    if isinstance(gate_up, torch.Tensor) and can_stream(x, gate_up):
        return _stream(x, gate_up, None, gated=True, pdl=pdl, splits=1, rows=x.shape[0])[0]
    gate, up = product(x, gate_up).chunk(2, -1)
    return F.silu(gate) * up


def experts_gated_linear(x: torch.Tensor, gate_up: torch.Tensor, used: ExpertsInUse, *, pdl: bool) -> torch.Tensor:
    """Return the weighted units of each expert in use in all rows, zero in rows that did not choose it: [J, R, F].

    What lies beyond ``used.count`` experts is left as it was.

    Args:
        x: [R, h]; ``can_stream`` holds of it and ``gate_up``.
        gate_up: [E, 2 F, h], the gate's rows first.
        used: the experts in use.
        pdl: launch programmatically dependent. Whatever wrote ``used`` has ended before this launches what is next.
    """
    num_used = used.ids.shape[0]
    return _stream(x, gate_up, None, gated=True, pdl=pdl, splits=num_used, rows=x.shape[0], experts=used)


def experts_split_linear(units: torch.Tensor, down: torch.Tensor, used: ExpertsInUse, *, pdl: bool) -> torch.Tensor:
    """Return summands of what the experts in use add to each row: [S, R, h], as ``split_linear`` does.

    Args:
        units: [J, R, F], as ``experts_gated_linear`` gives them, by the launch before this one.
        down: [E, h, F].
        used: the experts in use.
        pdl: launch programmatically dependent.
    """
    num_used, rows, depth = units.shape
    splits = choose_splits(down.shape[1], num_used * -(-depth // BK), _processors(units.device))
    return _stream(units.flatten(0, 1), down, None, gated=False, pdl=pdl, splits=splits, rows=rows, experts=used)
