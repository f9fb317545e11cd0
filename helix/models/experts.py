"""A mixture of experts: the router, and the experts that this rank holds.

Rows are replicated over all ranks and every feed-forward ends in an all-reduce over all of them, so experts need no
all-to-all: each rank routes all rows alike and computes what its own experts (EP) add with its own units of them (TPF),
and the all-reduce sums (arXiv 2507.07120, section 2.2).

With few rows every expert in use is multiplied with all of them (``linear.py``). With many, the pairs of a row and an
expert that it chose are sorted by expert and cut into blocks of one expert each. What is launched depends on sizes
alone, so a captured graph is right for every routing.

Shape letters: R rows, C experts a row chooses, E experts of this rank, F units of each of them here, h hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .linear import ExpertsInUse, can_stream, experts_gated_linear, experts_split_linear, split_linear
from .spec import Experts

ROUTE_WARP = 128  # scores that a warp looks through
MIN_DOT = 16  # the least rows of a product on tensor cores


def mixture(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    experts: Experts,
    first: int,
    pdl: bool = False,
) -> torch.Tensor:
    """Return summands of what this rank's experts add to each row: [S, R, h], float32 where S > 1, else as x.

    The sum over S and over all ranks is the feed-forward of x.

    Args:
        x: [R, h], equal on all ranks.
        router: [all experts, h].
        gate_up: [E, 2 F, h], the gate's rows first.
        down: [E, h, F].
        experts: how many are chosen, and whether their weights are made to sum to one.
        first: the id of this rank's first expert.
        pdl: launch programmatically dependent.
    """
    some = gate_up.numel() > 0
    if some and can_stream(x, gate_up.flatten(0, 1)) and can_stream(x, router) and down.stride(1) % 8 == 0:
        used = experts_in_use(split_linear(x, router, pdl=pdl), down.shape[0], experts, first=first, pdl=pdl)
        return experts_split_linear(experts_gated_linear(x, gate_up, used, pdl=pdl), down, used, pdl=pdl)
    return mix(x, *route(x, router, experts), gate_up, down, first=first).unsqueeze(0)


def route(x: torch.Tensor, router: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each row's experts: their weights [R, C] float32 and ids [R, C] int64, equal on all ranks.

    Args:
        x: [R, h], equal on all ranks.
        router: [all experts, h].
        experts: how many are chosen, and whether their weights are made to sum to one.
    """
    weights, ids = F.linear(x, router).softmax(-1, dtype=torch.float32).topk(experts.num_chosen, -1)
    if experts.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


@triton.jit
def _route_kernel(
    logits, ids, count, row_weights, num_rows, first,
    SUMMANDS: tl.constexpr, ALL: tl.constexpr, ALL_PAD: tl.constexpr, HELD: tl.constexpr, CHOSEN: tl.constexpr,
    NORMALISED: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for all rows: it finds what they chose, and lists which of this rank's experts that leaves in use."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r, e = tl.arange(0, BR), tl.arange(0, ALL_PAD)
    here = (r < num_rows)[:, None] & (e < ALL)[None, :]
    score = tl.zeros([BR, ALL_PAD], tl.float32)
    for s in tl.static_range(SUMMANDS):
        score += tl.load(logits + (s * num_rows + r)[:, None] * ALL + e[None, :], mask=here, other=0.0).to(tl.float32)
    score = tl.where((e < ALL)[None, :], score, float("-inf"))
    left = score
    for _ in range(CHOSEN):  # the lowest of equals, as top-k does on GPUs
        at = tl.min(tl.where(left == tl.max(left, 1)[:, None], e[None, :], ALL_PAD), 1)
        left = tl.where(e[None, :] == at[:, None], float("-inf"), left)
    chosen = left != score
    value = tl.exp(score - tl.max(score, 1)[:, None])
    total = tl.sum(tl.where(chosen, value, 0.0) if NORMALISED else value, 1)
    weight = tl.where(chosen & here, value / total[:, None], 0.0)
    held = (e >= first) & (e < first + HELD)
    tl.store(row_weights + (e - first)[None, :] * num_rows + r[:, None], weight, mask=here & held[None, :])
    used = ((tl.max(weight, 0) > 0.0) & held).to(tl.int32)
    tl.store(ids + tl.cumsum(used, 0) - used, e - first, mask=used > 0)
    tl.store(count, tl.sum(used, 0))


def experts_in_use(
    logits: torch.Tensor, num_held: int, experts: Experts, *, first: int, pdl: bool = False
) -> ExpertsInUse:
    """Do what ``route`` does for few rows, and list the experts in use, in one launch.

    Args:
        logits: [S, R, all experts], the router's, whose sum over S counts.
        num_held: E.
        experts: how many are chosen, and whether their weights are made to sum to one.
        first: the id of this rank's first expert.
        pdl: launch programmatically dependent.
    """
    summands, rows, num_experts = logits.shape
    ids = torch.empty(min(num_held, rows * experts.num_chosen), dtype=torch.int32, device=logits.device)
    count, row_weights = ids.new_empty(1), ids.new_empty((num_held, rows), dtype=torch.float32)
    padded, rows_padded = triton.next_power_of_2(num_experts), triton.next_power_of_2(rows)
    _route_kernel[(1,)](
        logits, ids, count, row_weights, rows, first,
        SUMMANDS=summands, ALL=num_experts, ALL_PAD=padded, HELD=num_held, CHOSEN=experts.num_chosen,
        NORMALISED=experts.normalised, BR=rows_padded, PDL=pdl,
        num_warps=max(1, min(16, padded * rows_padded // ROUTE_WARP)), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return ExpertsInUse(ids, count, row_weights)


def mix(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int,
) -> torch.Tensor:
    """Return what this rank's experts add to each row: [R, h] in x's dtype, a summand of the all-reduce.

    Args:
        x: [R, h].
        weights, ids: [R, C], as ``route`` gives them.
        gate_up: [E, 2 F, h], the gate's rows first.
        down: [E, h, F].
        first: the id of this rank's first expert.
    """
    compute = mix_kernels if x.is_cuda else mix_reference
    return compute(x, weights, ids, gate_up, down, first=first)


def mix_reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int,
) -> torch.Tensor:
    """Do what ``mix`` does expert by expert, on any device; sums are float32 (float64 stays float64)."""
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for expert in range(gate_up.shape[0]):
        row, choice = (ids == first + expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[row], gate_up[expert]).chunk(2, -1)
        added = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, row, added.to(out.dtype) * weights[row, choice].unsqueeze(-1))
    return out.to(x.dtype)


@triton.jit
def _gate_up_kernel(
    x, w, order, block_expert, block_start, expert_stop, hidden,
    CHOSEN: tl.constexpr, UNITS: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden[i, n] = silu(x . gate row n) * (x . up row n), x the row of pair i, for the pairs of one block."""
    block, n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)  # the cache then holds a block's rows
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert >= 0:
        i = tl.load(block_start + block) + tl.arange(0, BM)
        real = i < tl.load(expert_stop + expert)
        row = tl.load(order + i, mask=real, other=0) // CHOSEN
        gate = w + (expert * 2 * UNITS + n) * H
        a = tl.zeros([BM, BN], tl.float32)
        b = tl.zeros([BM, BN], tl.float32)
        for at in range(0, H, BK):
            k = at + tl.arange(0, BK)
            here = (n < UNITS)[:, None] & (k < H)[None, :]
            x_mk = tl.load(x + row[:, None] * H + k[None, :], mask=real[:, None] & (k < H)[None, :], other=0.0)
            gate_nk = tl.load(gate[:, None] + k[None, :], mask=here, other=0.0)
            up_nk = tl.load(gate[:, None] + UNITS * H + k[None, :], mask=here, other=0.0)
            a += tl.dot(x_mk, tl.trans(gate_nk), input_precision="ieee")
            b += tl.dot(x_mk, tl.trans(up_nk), input_precision="ieee")
        value = (a / (1.0 + tl.exp(-a)) * b).to(hidden.dtype.element_ty)
        tl.store(hidden + i[:, None] * UNITS + n[None, :], value, mask=real[:, None] & (n < UNITS)[None, :])


@triton.jit
def _down_kernel(
    hidden, w, order, block_expert, block_start, expert_stop, out,
    UNITS: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[pair i, n] = hidden[i] . down row n, for the pairs of one block."""
    block, n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert >= 0:
        i = tl.load(block_start + block) + tl.arange(0, BM)
        real = i < tl.load(expert_stop + expert)
        pair = tl.load(order + i, mask=real, other=0)
        down = w + (expert * H + n) * UNITS
        acc = tl.zeros([BM, BN], tl.float32)
        for at in range(0, UNITS, BK):
            k = at + tl.arange(0, BK)
            hidden_mk = tl.load(
                hidden + i[:, None] * UNITS + k[None, :], mask=real[:, None] & (k < UNITS)[None, :], other=0.0
            )
            down_nk = tl.load(down[:, None] + k[None, :], mask=(n < H)[:, None] & (k < UNITS)[None, :], other=0.0)
            acc += tl.dot(hidden_mk, tl.trans(down_nk), input_precision="ieee")
        to = out + pair[:, None] * H + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=real[:, None] & (n < H)[None, :])


@triton.jit
def _combine_kernel(
    pairs, weights, ids, out, first, held,
    CHOSEN: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
):  # fmt: skip
    """out[row] = the weighted sum of the row's pairs, of those whose expert is one of ``held`` from ``first`` on."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, H_PAD)
    total = tl.zeros([H_PAD], tl.float32)
    for c in tl.static_range(CHOSEN):
        pair = row * CHOSEN + c
        expert = tl.load(ids + pair)
        here = (i < H) & (expert >= first) & (expert < first + held)
        total += tl.load(weights + pair) * tl.load(pairs + pair * H + i, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * H + i, total.to(out.dtype.element_ty), mask=i < H)


def mix_kernels(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int,
) -> torch.Tensor:
    """Do what ``mix`` does with Triton launches of a shape that depends on sizes alone."""
    (num_rows, hidden_size), chosen = x.shape, ids.shape[1]
    num_experts, units = down.shape[0], down.shape[2]
    pairs = num_rows * chosen
    if not (pairs and num_experts and units):
        return torch.zeros_like(x)
    rows = _rows_of_a_block(pairs, num_experts)
    order, block_expert, block_start, expert_stop = blocks_of(ids.flatten() - first, num_experts, rows)
    hidden, added = x.new_empty((pairs, units)), x.new_empty((pairs, hidden_size))
    many = rows >= 64
    tile = {
        "BM": rows,
        "BN": 128 if many else 64,
        "BK": 64 if x.element_size() == 2 else 32,
        "num_warps": 8 if many else 4,
        "num_stages": 4 if many else 3,
    }
    x, blocks = x.contiguous(), block_expert.shape[0]
    _gate_up_kernel[(-(-units // tile["BN"]), blocks)](
        x, gate_up, order, block_expert, block_start, expert_stop, hidden,
        CHOSEN=chosen, UNITS=units, H=hidden_size, **tile,
    )  # fmt: skip
    _down_kernel[(-(-hidden_size // tile["BN"]), blocks)](
        hidden, down, order, block_expert, block_start, expert_stop, added, UNITS=units, H=hidden_size, **tile
    )
    out = torch.empty_like(x)
    _combine_kernel[(num_rows,)](
        added, weights, ids, out, first, num_experts,
        CHOSEN=chosen, H=hidden_size, H_PAD=triton.next_power_of_2(hidden_size), num_warps=4,
    )  # fmt: skip
    return out


def blocks_of(
    local_ids: torch.Tensor, num_experts: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort pairs by expert and cut each expert's into blocks of at most ``rows``, without looking at the device.

    Args:
        local_ids: [P] int64, the expert of each pair; outside 0..E-1 where another rank holds it.
        num_experts: E.
        rows: pairs a block.

    Returns:
        order [P], the pairs by expert; for each of as many blocks as there could be its expert, or -1, and the place in
        ``order`` where it begins; and the place where each expert ends [E]. All int64.
    """
    pairs, device = local_ids.shape[0], local_ids.device
    elsewhere = (local_ids < 0) | (local_ids >= num_experts)
    expert, order = local_ids.masked_fill(elsewhere, num_experts).sort(stable=True)
    every = torch.arange(num_experts, device=device)
    stop = torch.searchsorted(expert, every, right=True)
    start = torch.searchsorted(expert, every)
    num_blocks = (stop - start + rows - 1) // rows
    last_block = num_blocks.cumsum(0)  # one past each expert's
    block = torch.arange(min(pairs, pairs // rows + num_experts), device=device)
    block_expert = torch.searchsorted(last_block, block, right=True)
    there = block_expert < num_experts
    at = block_expert.clamp(max=num_experts - 1)
    block_start = start[at] + (block - (last_block - num_blocks)[at]) * rows
    return order, torch.where(there, block_expert, -1), block_start, stop


def _rows_of_a_block(pairs: int, num_experts: int) -> int:
    """Return how many pairs a block takes: what an expert gets on average, within what tensor cores like."""
    return max(MIN_DOT, min(128, triton.next_power_of_2(-(-pairs // num_experts))))
