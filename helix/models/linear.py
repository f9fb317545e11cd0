"""Projections of few rows: a kernel that streams the weights at memory speed, and the library elsewhere.

A decode step's projections are bound by the bytes of their weights, and those bytes depend on nothing that the step
computes. So the kernel asks for as many as its stages hold before it waits for the kernel that makes its rows
(programmatic dependent launch): memory is busy while the step waits for other ranks.

A program takes 64 rows of the weights (the tensor core's M) and a part of K, and multiplies them with all rows at once.
Where K is split, the parts are summed by whoever reads them: the all-reduce, or the kernel that rotates.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 64
STAGE_BYTES = 147456  # one program a processor; memory needs some 10 MB in flight to be busy
BN, BK = 64, 128
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _stream_weights_kernel(
    w, x, bias, out, num_rows, columns, num_turns,
    BM: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out[split, m, n] = x[m, :] . w[0, n, :] over the split's part of K; or silu of that times x[m, :] . w[1, n, :].

    ``w`` describes [1 or 2, N, K] in tiles of BN rows together, ``x`` [R, K] in tiles of BM; a turn takes one of each.
    What lies outside the tensors is read as zero.
    """
    if PDL:
        gdc_launch_dependents()
    PARTS: gl.constexpr = w.block_shape[0]
    HALF: gl.constexpr = w.block_shape[1]
    BN: gl.constexpr = PARTS * HALF
    BK: gl.constexpr = w.block_shape[2]
    BYTES: gl.constexpr = (BN + BM) * BK * w.dtype.primitive_bitwidth // 8
    n0, split = gl.program_id(0) * HALF, gl.program_id(1)
    first = split * num_turns // SPLITS
    count = (split + 1) * num_turns // SPLITS - first
    w_parts = gl.allocate_shared_memory(w.dtype, [STAGES, PARTS, HALF, BK], w.layout)
    w_tiles = w_parts._reinterpret(w.dtype, [STAGES, BN, BK], x.layout)
    x_tiles = gl.allocate_shared_memory(w.dtype, [STAGES, BM, BK], x.layout)
    # made here, so that it shares no memory with tiles: a warp may be done while another's products still read them
    sums = gl.allocate_shared_memory(gl.float32, [BN, BM], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.expect(bars.index(s), BYTES, pred=s < count)
        at = (first + s) * BK
        tma.async_copy_global_to_shared(w, [0, n0, at], bars.index(s), w_parts.index(s), pred=s < count)
    if PDL:
        gdc_wait()
    for s in gl.static_range(STAGES):
        at = (first + s) * BK
        tma.async_copy_global_to_shared(x, [0, at], bars.index(s), x_tiles.index(s), pred=s < count)
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    acc = gl.zeros([BN, BM], gl.float32, layout=layout)
    for i in range(count):
        now = i % STAGES
        mbarrier.wait(bars.index(now), (i // STAGES) & 1)
        acc = warpgroup_mma(w_tiles.index(now), x_tiles.index(now).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        # the products of the turn before are done: its stage takes the tiles of the turn that comes next there
        turn = i - 1 + STAGES
        more = (i > 0) & (turn < count)
        then = turn % STAGES
        at = (first + turn) * BK
        mbarrier.expect(bars.index(then), BYTES, pred=more)
        tma.async_copy_global_to_shared(w, [0, n0, at], bars.index(then), w_parts.index(then), pred=more)
        tma.async_copy_global_to_shared(x, [0, at], bars.index(then), x_tiles.index(then), pred=more)
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
    to = out + ((split * num_rows + m).to(gl.int64)[None, :] * columns + n[:, None])
    gl.store(to, value.to(dtype), mask=(n < columns)[:, None] & (m < num_rows)[None, :])


@cache
def _processors(device: torch.device) -> int:
    """Return the number of processors of a GPU that the kernel runs on (Hopper and later), else 0."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major == 9 else 0


def _tiles(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def choose_splits(columns: int, turns: int, processors: int) -> int:
    """Return how many parts K, which takes so many turns, is cut into, so that programs fill the GPU."""
    return max(1, min(processors // -(-columns // BN), turns // 2))


def _stream(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, *, gated: bool, pdl: bool, splits: int
) -> torch.Tensor:
    """Launch the kernel: [S, R, N], float32 where S > 1."""
    parts = 2 if gated else 1
    w = w.unflatten(0, (parts, -1))
    columns, (rows, depth) = w.shape[1], x.shape
    bm, half = max(8, triton.next_power_of_2(rows)), BN // parts
    out = torch.empty((splits, rows, columns), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    _stream_weights_kernel[(-(-columns // half), splits)](
        _tiles(w, [parts, half, BK]), _tiles(x, [bm, BK]), x if bias is None else bias, out,
        rows, columns, -(-depth // BK),
        BM=bm, STAGES=STAGE_BYTES // ((BN + bm) * BK * x.element_size()), SPLITS=splits,
        HAS_BIAS=bias is not None, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def _can_stream(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Few rows of a 2-byte dtype on a GPU with the kernel's instructions, aligned to what its copies need."""
    if not (x.is_cuda and x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.dtype in _ELEMENTS):
        return False
    aligned = all(t.stride(-1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, w))
    return aligned and _processors(x.device) > 0


def split_linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, *, pdl: bool = False
) -> torch.Tensor:
    """Return summands of x [R, K] times w [N, K] transposed, plus bias [N]: [S, R, N].

    The result is their sum over S; they are float32 where S > 1, and in x's dtype where S is 1.
    """
    if _can_stream(x, w):
        splits = choose_splits(w.shape[0], -(-x.shape[1] // BK), _processors(x.device))
        return _stream(x, w, bias, gated=False, pdl=pdl, splits=splits)
    return F.linear(x, w, bias).unsqueeze(0)


def linear(x: torch.Tensor, w: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed: [R, N] in x's dtype, summed in float32."""
    if _can_stream(x, w):
        return _stream(x, w, None, gated=False, pdl=pdl, splits=1)[0]
    return F.linear(x, w)


def gated_linear(x: torch.Tensor, gate_up: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """Return silu(x gate^T) * (x up^T): [R, F] for gate_up [2 F, K], the gate's rows first."""
    if _can_stream(x, gate_up):
        return _stream(x, gate_up, None, gated=True, pdl=pdl, splits=1)[0]
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.silu(gate) * up
