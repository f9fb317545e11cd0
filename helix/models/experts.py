"""A mixture of experts: the router, and the experts that this rank holds.

Rows are replicated over all ranks and every feed-forward ends in an all-reduce over all of them, so experts need no
all-to-all: each rank routes all rows alike and computes what its own experts (EP) add with its own units of them (TPF),
and the all-reduce sums (arXiv 2507.07120, section 2.2).

With few rows every expert in use is multiplied with all of them (``linear.py``). With many, each expert has a queue of
the rows that chose it, which is worked off in blocks. What is launched depends on sizes alone, so a captured graph is
right for every routing.

Shape letters: R rows, C experts a row chooses, E experts of this rank, F units of each of them here, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from attention.shared_memory import fit_stages, shared_bytes

from . import grouped
from .expert_blocks import block_of, feed_forward_in_8_bits, num_blocks_of
from .gate import gate_rows
from .linear import (
    can_stream,
    experts_gated_linear,
    experts_split_linear,
    gated_linear,
    is_aligned,
    multiplies_in_8_bits,
    split_linear,
)
from .quantization import BLOCK
from .quantized import Matrix, as_float, in_stored_order, product
from .routing import experts_in_use, logits_of, queue_kernel, route, rule_of
from .spec import ClampedGate, Experts

MIN_DOT = 16  # the least rows of a product on tensor cores
MANY_PAIRS = 256  # of an expert on average, from which on they are copied together into blocks


@dataclass(frozen=True)
class ExpertBiases:
    """The biases of a mixture: of the router [all experts] float32, of its experts' matrices [E, 2 F] and [E, h].

    ``share`` is how much of the last this rank adds, of the ranks that share its experts.
    """

    score: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    share: float


def mixture(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    *,
    experts: Experts,
    first: int,
    bias: torch.Tensor | None = None,
    shared: tuple[Matrix, Matrix] | None = None,
    shared_router: torch.Tensor | None = None,
    biases: ExpertBiases | None = None,
    pdl: bool = False,
    chunk: bool = False,
) -> torch.Tensor:
    """Return summands of what this rank's experts add to each row: [S, R, h], float32 where S > 1, else as x.

    The sum over S and over all ranks is the feed-forward of x.

    Args:
        x: [R, h], equal on all ranks.
        router: [all experts, h].
        gate_up: [E, 2 F, h], the gate's rows first.
        down: [E, h, F].
        experts: how many are chosen, and how.
        first: the id of this rank's first expert.
        bias: [all experts] float32, where experts are chosen by sigmoid.
        shared: the matrices [2 F', h] and [h, F'] of experts that every row goes through.
        shared_router: [1, h], of the score that gates what these add; None where they are not gated.
        biases: of experts whose gates are clamped, which have no shared ones beside them; None without.
        pdl: launch programmatically dependent.
        chunk: rows are a prompt's, which may be quantised to meet quantised matrices.
    """
    if biases is not None:
        if x.is_cuda:
            scores = logits_of(x, router, biases.score)
            return mix_queued(x, scores, gate_up, down, experts=experts, first=first, biases=biases)[None]
        chosen = route(x, router, experts, score_bias=biases.score)
        return mix_reference(x, *chosen, gate_up, down, first=first, gate=experts.clamped, biases=biases)[None]
    if _few(x, router, (gate_up, down), shared):
        scores = split_linear(x, router, pdl=pdl, exact=True)
        used = experts_in_use(scores, down.shape[0], experts, first=first, bias=bias, pdl=pdl)
        units, hidden = experts_gated_linear(x, gate_up, used, shared=None if shared is None else shared[0], pdl=pdl)
        if shared is None or hidden is None:
            return experts_split_linear(units, down, used, pdl=pdl)
        hidden = gate_rows(hidden, x, shared_router, pdl=pdl)
        return experts_split_linear(units, down, used, shared=(hidden, shared[1]), pdl=pdl)
    if x.is_cuda:
        scores = logits_of(x, router)
        added = mix_queued(x, scores, gate_up, down, experts=experts, first=first, bias=bias, chunk=chunk)[None]
    else:
        added = mix_reference(x, *route(x, router, experts, bias), gate_up, down, first=first)[None]
    if shared is None:
        return added
    hidden = gate_rows(gated_linear(x, shared[0], pdl=pdl, chunk=chunk), x, shared_router)
    of_shared = split_linear(hidden, shared[1], pdl=pdl, chunk=chunk)
    return added + of_shared if len(of_shared) == 1 else torch.cat((added.float(), of_shared))


def _few(x: torch.Tensor, router: torch.Tensor, *pairs: tuple[Matrix, Matrix] | None) -> bool:
    """Return whether each expert in use is multiplied with all rows; pairs are matrices up and down."""
    return can_stream(x, router) and all(
        can_stream(x, up) and is_aligned(down) and down.shape[-1] % 8 == 0
        for up, down in (pair for pair in pairs if pair is not None)
    )


def mix_reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    *,
    first: int,
    gate: ClampedGate | None = None,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """Return what this rank's experts add to each row, one by one: [R, h] in x's dtype, summed in float32 at least.

    Args:
        x: [R, h].
        weights, ids: [R, C], as ``route`` gives them.
        gate_up: [E, 2 F, h], the gate's rows first.
        down: [E, h, F].
        first: the id of this rank's first expert.
        gate, biases: of experts whose gates are clamped.
    """
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for expert in range(gate_up.shape[0]):
        row, choice = (ids == first + expert).nonzero(as_tuple=True)
        both = product(x[row], gate_up[expert])
        if gate is None or biases is None:
            its_gate, up = both.chunk(2, -1)
            added = product(F.silu(its_gate) * up, down[expert])
        else:
            its_gate, up = (both + biases.gate_up[expert]).chunk(2, -1)
            its_gate, up = its_gate.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
            units = (up + 1) * its_gate * torch.sigmoid(gate.alpha * its_gate)
            added = product(units, down[expert]) + biases.down[expert] * biases.share
        out.index_add_(0, row, added.to(out.dtype) * weights[row, choice].unsqueeze(-1))
    return out.to(x.dtype)


@triton.jit
def _scale_of(scales, stride, row, here, at, BLOCK: tl.constexpr):
    """Return the scales of rows of a quantised matrix in the block of columns at ``at``; 1 where it is a plain one."""
    if BLOCK:
        return tl.load(scales + at // BLOCK * stride + row, mask=here, other=0.0)
    else:
        return 1.0


@triton.jit
def _add_product(acc, x_mk, w_nk, scale_n, BLOCK: tl.constexpr):
    """Return acc + x . w of one tile, whose columns are of one block where w is quantised."""
    if BLOCK:
        w_nk = as_float(w_nk).to(x_mk.dtype)
        return acc + tl.dot(x_mk, tl.trans(w_nk), input_precision="ieee") * scale_n[None, :]
    else:
        return acc + tl.dot(x_mk, tl.trans(w_nk), input_precision="ieee")


@triton.jit
def _gate_up_kernel(
    x, w, scales, scale_stride, bias, alpha, limit, counts, queues, hidden, num_rows,
    K: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    HELD: tl.constexpr, HELD_PAD: tl.constexpr, CHOSEN: tl.constexpr, UNITS: tl.constexpr, CLAMPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden[pair, n] = silu(x . gate row n) * (x . up row n), x the pair's row, for the pairs of one block; or as a
    ``ClampedGate`` says, with biases.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)  # fastest, so that the cache holds a block's rows and weights
    expert, pair, real = block_of(counts, queues, num_rows, tl.program_id(1), HELD, HELD_PAD, BM)
    if expert < HELD:
        row = pair // CHOSEN
        gate = expert * 2 * UNITS + n
        a = tl.zeros([BM, BN], tl.float32)
        b = tl.zeros([BM, BN], tl.float32)
        for at in range(0, SHIFT + K, BK):
            k = at - SHIFT + tl.arange(0, BK)
            inside = (k >= 0) & (k < K) if SHIFT else k < K
            here = (n < UNITS)[:, None] & inside[None, :]
            x_mk = tl.load(x + row[:, None] * K + k[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            gate_nk = tl.load(w + gate[:, None] * STRIDE + k[None, :], mask=here, other=0)
            up_nk = tl.load(w + (gate[:, None] + UNITS) * STRIDE + k[None, :], mask=here, other=0)
            a = _add_product(a, x_mk, gate_nk, _scale_of(scales, scale_stride, gate, n < UNITS, at, BLOCK), BLOCK)
            b = _add_product(b, x_mk, up_nk, _scale_of(scales, scale_stride, gate + UNITS, n < UNITS, at, BLOCK), BLOCK)
        if CLAMPED:
            a += tl.load(bias + gate, mask=n < UNITS, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias + gate + UNITS, mask=n < UNITS, other=0.0).to(tl.float32)[None, :]
            a, b = tl.minimum(a, limit), tl.minimum(tl.maximum(b, -limit), limit) + 1.0
        else:
            alpha = 1.0
        value = (a / (1.0 + tl.exp(-alpha * a)) * b).to(hidden.dtype.element_ty)
        tl.store(hidden + pair[:, None] * UNITS + n[None, :], value, mask=real[:, None] & (n < UNITS)[None, :])


@triton.jit
def _down_kernel(
    hidden, w, scales, scale_stride, bias, share, counts, queues, out, num_rows,
    K: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    HELD: tl.constexpr, HELD_PAD: tl.constexpr, H: tl.constexpr, BIASED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[pair, n] = hidden[pair] . down row n, and a share of its bias, for the pairs of one block."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    expert, pair, real = block_of(counts, queues, num_rows, tl.program_id(1), HELD, HELD_PAD, BM)
    if expert < HELD:
        down = expert * H + n
        acc = tl.zeros([BM, BN], tl.float32)
        for at in range(0, SHIFT + K, BK):
            k = at - SHIFT + tl.arange(0, BK)
            inside = (k >= 0) & (k < K) if SHIFT else k < K
            there = real[:, None] & inside[None, :]
            hidden_mk = tl.load(hidden + pair[:, None] * K + k[None, :], mask=there, other=0.0)
            here = (n < H)[:, None] & inside[None, :]
            down_nk = tl.load(w + down[:, None] * STRIDE + k[None, :], mask=here, other=0)
            acc = _add_product(acc, hidden_mk, down_nk, _scale_of(scales, scale_stride, down, n < H, at, BLOCK), BLOCK)
        if BIASED:
            acc += tl.load(bias + down, mask=n < H, other=0.0).to(tl.float32)[None, :] * share
        to = out + pair[:, None] * H + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=real[:, None] & (n < H)[None, :])


@triton.jit
def _combine_kernel(
    pairs, place_of, weights, out, CHOSEN: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, PLACED: tl.constexpr
):  # fmt: skip
    """out[row] = the weighted sum of the row's pairs, wherever they are; those of weight 0 are not read."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, H_PAD)
    total = tl.zeros([H_PAD], tl.float32)
    for c in tl.static_range(CHOSEN):
        pair = row * CHOSEN + c
        weight = tl.load(weights + pair)
        if PLACED:
            pair = tl.load(place_of + pair, mask=weight != 0.0, other=0).to(tl.int64)
        value = tl.load(pairs + pair * H + i, mask=i < tl.where(weight != 0.0, H, 0), other=0.0)
        total += weight * value.to(tl.float32)
    tl.store(out + row * H + i, total.to(out.dtype.element_ty), mask=i < H)


def mix_queued(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    *,
    experts: Experts,
    first: int,
    bias: torch.Tensor | None = None,
    biases: ExpertBiases | None = None,
    chunk: bool = False,
) -> torch.Tensor:
    """Do what ``route`` and ``mix_reference`` do in a few launches, from the router's logits [R, all experts].

    A pair is a row and one of the experts that it chose, counted row by row.
    """
    num_rows, hidden_size = x.shape
    num_held, _, units = down.shape
    chosen = experts.num_chosen
    num_pairs = num_rows * chosen
    if not (num_pairs and num_held and units):
        return torch.zeros_like(x)
    counts = torch.zeros(num_held, dtype=torch.int32, device=x.device)
    queues = counts.new_empty((num_held, num_rows))  # a row is at most once in a queue
    weights = counts.new_empty(num_pairs, dtype=torch.float32)
    of_rows = 16
    queue_kernel[(-(-num_rows // of_rows),)](
        logits, logits if bias is None else bias, experts.scale, weights, counts, queues, num_rows, first,
        HELD=num_held, BR=of_rows, **rule_of(experts), num_warps=4,
    )  # fmt: skip
    out, placed = torch.empty_like(x), False
    if biases is not None:
        added = place_of = _feed_forward(x, gate_up, down, counts, queues, num_pairs, experts.clamped, biases)
    elif chunk and multiplies_in_8_bits(gate_up, x) and multiplies_in_8_bits(down, x):
        placed = True
        added, place_of = feed_forward_in_8_bits(x, gate_up, down, counts, queues, num_pairs)
    elif num_pairs >= MANY_PAIRS * experts.num_experts and grouped.supports(x, gate_up, down):
        assert isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor)
        placed = True
        added, place_of = grouped.mix_blocks(x.contiguous(), counts, queues, gate_up, down, chosen)
    else:
        added = place_of = _feed_forward(x, gate_up, down, counts, queues, num_pairs)
    _combine_kernel[(num_rows,)](
        added, place_of, weights, out, CHOSEN=chosen, H=hidden_size, H_PAD=triton.next_power_of_2(hidden_size),
        PLACED=placed, num_warps=4,
    )  # fmt: skip
    return out


def _feed_forward(
    x: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    counts: torch.Tensor,
    queues: torch.Tensor,
    num_pairs: int,
    gate: ClampedGate | None = None,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """Return what experts make of their pairs, tiles widened where they are of 8 bits: [pairs, h] in x's dtype."""
    num_rows, hidden_size = x.shape
    num_held, _, units = down.shape
    rows = max(MIN_DOT, min(128, triton.next_power_of_2(-(-num_pairs // num_held))))  # what an expert gets on average
    many, depth = rows >= 64, (256 if rows == MIN_DOT else 128) // x.element_size()
    columns, limit = 128 if many else 64, shared_bytes(x.device)
    tile = {
        "HELD": num_held,
        "HELD_PAD": triton.next_power_of_2(num_held),
        "BM": rows,
        "BN": columns,
        "BK": depth,
        "num_warps": 8 if many else 4,
        "num_stages": fit_stages(4 if many else 3, (rows + 2 * columns) * depth * x.element_size(), limit),
    }
    blocks = num_blocks_of(num_pairs, num_held, rows)
    hidden, added = x.new_empty((num_pairs, units)), x.new_empty((num_pairs, hidden_size))
    alpha, most = (1.0, 0.0) if gate is None else (gate.alpha, gate.limit)
    operand, w, how = _operands(x, gate_up)
    _gate_up_kernel[(-(-units // tile["BN"]), blocks)](
        operand, *w, operand if biases is None else biases.gate_up, alpha, most, counts, queues, hidden, num_rows,
        CHOSEN=num_pairs // num_rows, UNITS=units, CLAMPED=gate is not None, **how, **tile,
    )  # fmt: skip
    operand, w, how = _operands(hidden, down)
    _down_kernel[(-(-hidden_size // tile["BN"]), blocks)](
        operand, *w, operand if biases is None else biases.down, 1.0 if biases is None else biases.share, counts,
        queues, added, num_rows, H=hidden_size, BIASED=biases is not None, **how, **tile,
    )  # fmt: skip
    return added


def _operands(
    x: torch.Tensor, w: Matrix
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, int], dict[str, int]]:
    """Return rows and matrices [E, N, K] as the kernels take them: rows; values, scales, their stride; constants."""
    if isinstance(w, torch.Tensor):
        return x.contiguous(), (w, w, 0), {"K": w.shape[-1], "STRIDE": w.stride(-2), "SHIFT": 0, "BLOCK": 0}
    values = w.values.view(torch.uint8)
    width = values.shape[-1]
    how = {"K": width, "STRIDE": width, "SHIFT": w.shift - w.lead, "BLOCK": BLOCK}
    return in_stored_order(x, w.shift).contiguous(), (values, w.scales, w.scales.stride(0)), how
