"""Projections of few rows: a kernel that streams the weights at memory speed, and the library elsewhere.

A decode step's projections are bound by the bytes of their weights, and those bytes depend on nothing that the step
computes. So the kernel asks for as many as its stages hold before it waits for the kernel that makes its rows
(programmatic dependent launch): memory is busy while the step waits for other ranks.

A program takes 64 rows of the weights (the tensor core's M), or 128, and a part of K, and multiplies them with all rows
at once. Where K is split, the parts are summed by whoever reads them: the all-reduce, or the kernel that rotates. Each
program reads all of x from the cache, so that 64 rows of x are as many bytes as its weights: where 64 rows of weights a
program already fill the GPU without a cut of K, it takes 128.

Quantised matrices stream as they are: a tile of 8 bits is widened in registers, exactly, and a turn's products are
multiplied by the scales of its block, whatever the number of rows, so that a row is computed alike in all of them.

Experts go through the same kernels. With few rows it is the bytes of the experts in use that take the time, so each of
them is multiplied with all rows, and its units are zero in the rows that did not choose it: nothing needs to be sorted,
and going back to the hidden size is one sum over the units of all experts in use. Shared experts, which every row goes
through, are more programs and more turns of the same launches: their weights stream while it is found out which others
are in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeGuard

import torch
import torch.nn.functional as F
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from parallel.device import capability
from parallel.eight_bits import RowsInEightBits

from .chunk_product import can_multiply_in_8_bits, feed_forward_in_8_bits, product_in_8_bits, product_of_rows
from .gate import silu_mul
from .quantization import BLOCK
from .quantized import Matrix, Quantized, product
from .stream_quantized import stream_quantized_kernel
from .stream_weights import stream_weights_kernel

MAX_ROWS = 64
BN, WIDE_BN, BK = 64, 128, 128
STAGE_BYTES = {BN: 147456, WIDE_BN: 196608}  # one program a processor; memory needs some 10 MB in flight to be busy
SHARED_BYTES = 233472  # of a processor
OWN_BYTES = 1536  # of these each program has some of the system's, and some for barriers
X_STAGES = 2  # of tiles of x where they are as large as those of quantised weights, which get the room
LEAST_STAGES = 3  # of programs that share a processor's memory
FEWEST = 2  # programs that share a processor's memory: the next kernel's find room beside those of a small grid
FEW_TURNS = 8  # a kernel whose programs take fewer is over before the next one has begun, unless that finds room
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_LAYOUTS = _ELEMENTS | {torch.uint8: gl.uint8}
assert BK == BLOCK  # a turn has one scale a row


@cache
def _processors(device: torch.device) -> int:
    """Return the number of processors of a GPU that the kernel runs on (Hopper), else 0."""
    if capability(device)[0] != 9:
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _tiles(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _LAYOUTS[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


def _scale_tiles(scales: torch.Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(scales, list(scales.shape), list(scales.stride()), [1, rows], layout)


def choose_splits(columns: int, turns: int, programs: int, bn: int = BN) -> int:
    """Return how many parts K, which takes so many turns, is cut into, so that programs fill the GPU."""
    return max(1, min(programs // -(-columns // bn), turns // 2))


def _width_of(tiles: int, device: torch.device) -> int:
    """Return how many rows of a matrix that is not quantised a program takes, where by BN there are so many tiles."""
    return WIDE_BN if 2 * tiles > _processors(device) else BN


def _splits_of(w: Matrix, turns: int, device: torch.device) -> int:
    """Return how many parts K is cut into: as many for any number of rows, so that a row's bits depend on no other."""
    if isinstance(w, torch.Tensor):
        return choose_splits(w.shape[-2], turns, _processors(device), _width_of(-(-w.shape[-2] // BN), device))
    programs = 4 * _processors(device)
    splits = choose_splits(w.shape[-2], turns, programs)
    return splits if turns >= FEW_TURNS * splits else choose_splits(w.shape[-2], turns, programs * 3 // 4)


def _tile_of(rows: int) -> tuple[int, int]:
    """Return how many rows of a quantised matrix a program takes, and how many programs a processor, for rows of x.

    Tiles are widened while others' products run, by another program or by other warps. With many rows these share the
    tile of x, and sums need registers.
    """
    return (BN, 4) if rows <= 32 else (2 * BN, 2)


def _turns_of(w: Matrix) -> int:
    """Return how many turns K takes: one for each block that a quantised slice touches."""
    return w.scales.shape[0] if isinstance(w, Quantized) else -(-w.shape[-1] // BK)


@dataclass(frozen=True)
class ExpertsInUse:
    """The experts of this rank that a step's rows chose, without a look from the host.

    Attributes:
        ids: [J] int32, which they are, ascending; J is as many as there could be. Only the first ``count`` are read.
        count: [1] int32.
        row_weights: [E, R] float32, the weight of each of this rank's experts in each row; 0 where it was not chosen.
        expected: how many there are on average, where each of all experts is equally likely.
    """

    ids: torch.Tensor
    count: torch.Tensor
    row_weights: torch.Tensor
    expected: float


def _stream(
    x: torch.Tensor,
    w: Matrix,
    bias: torch.Tensor | None,
    *,
    gated: bool,
    pdl: bool,
    splits: int,
    rows: int,
    experts: ExpertsInUse | None = None,
    exact: bool = False,
    beside: tuple[torch.Tensor, Matrix] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernel for w [1 or E, 1 or 2 times N, K]: [S, R, N], float32 where S > 1 and these are summands, or
    where it is to be ``exact``; or what ``out`` has room for. ``beside``: rows and matrix of experts that all rows go
    through, multiplied in the same launch; neither matrix is quantised then.
    """
    parts = 2 if gated else 1
    columns, turns = w.shape[-2] // parts, _turns_of(w)
    each = gated and experts is not None
    if isinstance(w, Quantized):
        bn, programs = _tile_of(rows)
    else:
        bn, programs = _width_of(-(-columns * parts // BN) * (splits if each else 1), x.device), 1
    bm, half = max(8, triton.next_power_of_2(rows)), bn // parts
    dtype = x.dtype if (splits == 1 or each) and not exact else torch.float32
    if out is None:
        out = torch.empty((splits, rows, columns), dtype=dtype, device=x.device)
    ids, count, row_weights = (x, x, x) if experts is None else (experts.ids, experts.count, experts.row_weights)
    tiles = _tiles(_matrices(w, columns), [parts, half, BK]), _tiles(x, [bm, BK])
    rest = x if bias is None else bias, out, ids, count, row_weights, rows, columns, turns
    how = {
        "BM": bm,
        "HAS_BIAS": bias is not None,
        "EXPERTS": None if experts is None else "each" if each else "all",
        "PDL": pdl,
        "num_warps": bn // 16,
        **({"launch_pdl": True} if pdl else {}),
    }
    grid, splits = (-(-columns // half), splits), 1 if each else splits
    if isinstance(w, Quantized):
        neighbours = _neighbours(grid, programs, x.device) if each else programs
        of_all = turns if experts is None or each else turns * ids.shape[0]
        stages, x_stages = _stages_of(bn, bm * BK * x.element_size(), neighbours, of_all // splits)
        registers = 65536 // (programs * 32 * (bn // 16 + 4)) // 8 * 8  # a thread's; the warp that asks counts as four
        scales = _scale_tiles(w.scales, half), w.shift, w.shift - w.lead
        how |= {"STAGES": stages, "X_STAGES": x_stages, "maxnreg": registers}
        stream_quantized_kernel[grid](*tiles, *scales, *rest, splits, **how)
        return out
    theirs, share, their_columns = tiles, 0, 0
    if beside is not None:
        their_x, their_w = beside
        their_columns = their_w.shape[-2] // parts
        theirs = _tiles(_matrices(their_w, their_columns), [parts, half, BK]), _tiles(their_x, [bm, BK])
        share = -(-their_columns // (half * grid[0])) if each else _turns_of(their_w)
        grid = (grid[0], grid[1] + share) if each else grid
    at_once = grid[0] * (share + experts.expected) if each and experts is not None else 0
    how |= {"STAGES": _wide_stages_of(bn, bm, at_once, x.device), "BESIDE": beside is not None}
    stream_weights_kernel[grid](*tiles, *theirs, *rest, splits, share, their_columns, **how)
    return out


def _wide_stages_of(bn: int, bm: int, at_once: float, device: torch.device) -> int:
    """Return how many stages a program has for tiles of bn rows of a matrix that is not quantised, and bm of x.

    ``at_once``: how many programs of experts' gates have something to do, which share a processor by twos where there
    are more of them than processors; 0 for what never shares one.
    """
    stage_bytes = (bn + bm) * BK * 2
    if at_once > _processors(device):
        stages = (SHARED_BYTES // 2 - OWN_BYTES - bn * bm * 4) // stage_bytes
        if stages >= LEAST_STAGES:
            return stages
    return STAGE_BYTES[bn] // stage_bytes


def _neighbours(grid: tuple[int, int], programs: int, device: torch.device) -> int:
    """Return how many programs share a processor's memory: as many as can, or as few as a small grid has there."""
    return min(programs, max(FEWEST, -(-grid[0] * grid[1] // _processors(device))))


def _stages_of(bn: int, x_bytes: int, neighbours: int, turns: int) -> tuple[int, int]:
    """Return how many stages a program has for tiles of bn rows of a quantised matrix, and for those of x.

    It takes so many turns, and is one of so many on its processor.
    """
    room, w_bytes = SHARED_BYTES // neighbours - OWN_BYTES, bn * (BK + 4)
    x_stages = X_STAGES if bn > BN and turns >= FEW_TURNS else room // (w_bytes + x_bytes)
    return (room - x_stages * x_bytes) // w_bytes, x_stages


def _matrices(w: Matrix, rows: int) -> torch.Tensor:
    """Return w's elements, or bytes where it is quantised, as matrices of so many rows: [M, rows, K]."""
    if isinstance(w, torch.Tensor):
        return w.reshape(-1, rows, w.shape[-1])
    values = w.values.view(torch.uint8)
    return (values if values.dim() == 2 else values.flatten(0, 1)).unflatten(0, (-1, rows))


def can_stream(x: torch.Tensor, w: Matrix) -> bool:
    """Return whether x [R, K] times w [N, K] (or E of them) transposed goes through the kernel.

    It does for few rows of a 2-byte dtype on a GPU with the kernel's instructions, aligned to what its copies need.
    """
    if not (x.is_cuda and x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.dtype in _ELEMENTS and w.numel()):
        return False
    return _begins_aligned(x) and is_aligned(w) and _processors(x.device) > 0


def is_aligned(w: Matrix) -> bool:
    """Return whether all that is copied of w, and of the rows beside it, begins at multiples of 16 bytes."""
    if isinstance(w, Quantized):
        return w.shift % 8 == 0 and w.shape[-2] % 8 == 0 and _begins_aligned(w.scales)
    return _begins_aligned(w)


def _begins_aligned(tensor: torch.Tensor) -> bool:
    strides = tensor.stride(-1) == 1 and tensor.stride(-2) * tensor.element_size() % 16 == 0
    return strides and tensor.data_ptr() % 16 == 0


def multiplies_in_8_bits(w: Matrix, x: torch.Tensor) -> TypeGuard[Quantized]:
    """Return whether both operands are of 8 bits in a chunk of a prompt: where w is and the GPU can."""
    return x.shape[0] > MAX_ROWS and can_multiply_in_8_bits(w, x)


def _many_rows(x: torch.Tensor, w: Matrix, bias: torch.Tensor | None, *, chunk: bool) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed, plus bias [N]: [R, N]."""
    if chunk and multiplies_in_8_bits(w, x):
        return product_in_8_bits(x, w, bias)
    return product(x, w, bias)


def split_linear(
    x: torch.Tensor | RowsInEightBits,
    w: Matrix,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    exact: bool = False,
    chunk: bool = False,
) -> torch.Tensor:
    """Return summands of x [R, K] times w [N, K] transposed, plus bias [N]: [S, R, N].

    The result is their sum over S; they are float32 where S > 1, and in x's dtype where S is 1. Where ``can_stream``
    holds, ``exact`` ones are float32 always. ``chunk``: many rows of x, a prompt's, may be quantised to meet a
    quantised w; those that decode are not, so that what they choose does not depend on how many they are. Rows that are
    of 8 bits already meet such a w alone.
    """
    if isinstance(x, RowsInEightBits):
        assert isinstance(w, Quantized)
        return product_of_rows(x, w, bias).unsqueeze(0)
    if can_stream(x, w):
        splits = _splits_of(w, _turns_of(w), x.device)
        return _stream(x, w, bias, gated=False, pdl=pdl, splits=splits, rows=x.shape[0], exact=exact)
    return _many_rows(x, w, bias, chunk=chunk).unsqueeze(0)


def linear(x: torch.Tensor, w: Matrix, *, pdl: bool = False, chunk: bool = False) -> torch.Tensor:
    """Return x [R, K] times w [N, K] transposed: [R, N] in x's dtype, summed in float32; ``chunk`` as above."""
    if can_stream(x, w):
        return _stream(x, w, None, gated=False, pdl=pdl, splits=1, rows=x.shape[0])[0]
    return _many_rows(x, w, None, chunk=chunk)


def gated_linear(
    x: torch.Tensor, gate_up: Matrix, *, gelu: bool = False, pdl: bool = False, chunk: bool = False
) -> torch.Tensor:
    """Return silu(x gate^T) * (x up^T): [R, F] for gate_up [2 F, K], the gate's rows first; ``chunk`` as above.

    ``gelu``: its tanh form stands for silu, in PyTorch.
    """
    if gelu:
        gate, up = product(x, gate_up).chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up
    if can_stream(x, gate_up):
        return _stream(x, gate_up, None, gated=True, pdl=pdl, splits=1, rows=x.shape[0])[0]
    if chunk and multiplies_in_8_bits(gate_up, x):
        return product_in_8_bits(x, gate_up, gated=True)
    return silu_mul(product(x, gate_up))


def feed_forward(
    x: torch.Tensor | RowsInEightBits,
    gate_up: Matrix,
    down: Matrix,
    *,
    gelu: bool = False,
    pdl: bool = False,
    chunk: bool = False,
) -> torch.Tensor:
    """Return summands of what ``gated_linear`` makes times down [h, F] transposed: [S, R, h], as ``split_linear``."""
    if isinstance(x, RowsInEightBits):
        assert isinstance(gate_up, Quantized) and isinstance(down, Quantized)
        return feed_forward_in_8_bits(x, gate_up, down).unsqueeze(0)
    if chunk and not gelu and multiplies_in_8_bits(gate_up, x) and multiplies_in_8_bits(down, x):
        return feed_forward_in_8_bits(x, gate_up, down).unsqueeze(0)
    return split_linear(gated_linear(x, gate_up, gelu=gelu, pdl=pdl, chunk=chunk), down, pdl=pdl, chunk=chunk)


def experts_gated_linear(
    x: torch.Tensor, gate_up: Matrix, used: ExpertsInUse, *, pdl: bool, shared: Matrix | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weighted units of each expert in use in all rows, zero in rows that did not choose it: [J, R, F].

    What lies beyond ``used.count`` experts is left as it was. Second come the units of shared experts [R, F'], None
    without any: in the same launch where nothing is quantised, so that their weights stream while it is found out which
    others are in use.

    Args:
        x: [R, h]; ``can_stream`` holds of it and the matrices.
        gate_up: [E, 2 F, h], the gate's rows first.
        used: the experts in use.
        pdl: launch programmatically dependent. Whatever wrote ``used`` has ended before this launches what is next.
        shared: [2 F', h], of shared experts.
    """
    (rows, _), num_used, units = x.shape, used.ids.shape[0], gate_up.shape[-2] // 2
    if isinstance(gate_up, torch.Tensor) and isinstance(shared, torch.Tensor):
        first = rows * (shared.shape[-2] // 2)
        out, beside = x.new_empty(first + num_used * rows * units), (x, shared)
        _stream(x, gate_up, None, gated=True, pdl=pdl, splits=num_used, rows=rows, experts=used, beside=beside, out=out)
        return out[first:].view(num_used, rows, units), out[:first].view(rows, -1)
    theirs = None if shared is None else gated_linear(x, shared, pdl=pdl)
    return _stream(x, gate_up, None, gated=True, pdl=pdl, splits=num_used, rows=rows, experts=used), theirs


def experts_split_linear(
    units: torch.Tensor,
    down: Matrix,
    used: ExpertsInUse,
    *,
    pdl: bool,
    shared: tuple[torch.Tensor, Matrix] | None = None,
) -> torch.Tensor:
    """Return summands of what the experts in use, and shared ones, add to each row: [S, R, h], as ``split_linear``.

    Args:
        units: [J, R, F], as ``experts_gated_linear`` gives them, by the launch before this one or the one before that.
        down: [E, h, F].
        used: the experts in use.
        pdl: launch programmatically dependent.
        shared: the units of shared experts [R, F'] and their matrix [h, F'], of which ``can_stream`` holds. They are
            more turns of the same launch where nothing is quantised.
    """
    num_used, rows, _ = units.shape
    turns, flat = num_used * _turns_of(down), units.flatten(0, 1)
    rides = shared is not None and isinstance(down, torch.Tensor) and isinstance(shared[1], torch.Tensor)
    if shared is None or rides:
        turns += 0 if shared is None else _turns_of(shared[1])
        splits = _splits_of(down, turns, units.device)
        return _stream(flat, down, None, gated=False, pdl=pdl, splits=splits, rows=rows, experts=used, beside=shared)
    theirs, w = shared
    splits, more = _splits_of(down, turns, units.device), _splits_of(w, _turns_of(w), units.device)
    out = torch.empty((splits + more, rows, w.shape[-2]), dtype=torch.float32, device=units.device)
    _stream(flat, down, None, gated=False, pdl=pdl, splits=splits, rows=rows, experts=used, out=out[:splits])
    _stream(theirs, w, None, gated=False, pdl=pdl, splits=more, rows=rows, out=out[splits:])
    return out
