"""A mixture of experts: the router, and the experts that this rank holds.

Rows are replicated over all ranks and every feed-forward ends in an all-reduce over all of them, so experts need no
all-to-all: each rank routes all rows alike and computes what its own experts (EP) add with its own units of them (TPF),
and the all-reduce sums (arXiv 2507.07120, section 2.2).

On GPUs the pairs of a row and an expert that it chose are sorted by expert and cut into blocks of one expert each. How
many blocks there may be depends on sizes alone, so a captured graph is right for every routing.

Shape letters: R rows, C experts a row chooses, E experts of this rank, F units of each of them here, h hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .spec import Experts

MIN_DOT = 16  # the least rows of a product on tensor cores


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
    block, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
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
    hidden, w, order, weights, block_expert, block_start, expert_stop, out,
    UNITS: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[pair i, n] = weight of pair i * (hidden[i] . down row n), for the pairs of one block."""
    block, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
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
        value = (acc * tl.load(weights + pair, mask=real, other=0.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + pair[:, None] * H + n[None, :], value, mask=real[:, None] & (n < H)[None, :])


def mix_kernels(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int,
) -> torch.Tensor:
    """Do what ``mix`` does with two Triton launches of a shape that depends on sizes alone."""
    (num_rows, hidden_size), chosen = x.shape, ids.shape[1]
    num_experts, units = down.shape[0], down.shape[2]
    pairs = num_rows * chosen
    out = x.new_zeros((pairs, hidden_size))  # pairs of other ranks' experts add nothing
    if pairs and num_experts and units:
        rows = _rows_of_a_block(pairs, num_experts)
        order, block_expert, block_start, expert_stop = blocks_of(ids.flatten() - first, num_experts, rows)
        hidden = x.new_empty((pairs, units))
        tile = {"BM": rows, "BN": 64, "BK": 64 if x.element_size() == 2 else 32, "num_warps": 4, "num_stages": 3}
        x, blocks = x.contiguous(), block_expert.shape[0]
        _gate_up_kernel[(blocks, -(-units // tile["BN"]))](
            x, gate_up, order, block_expert, block_start, expert_stop, hidden,
            CHOSEN=chosen, UNITS=units, H=hidden_size, **tile,
        )  # fmt: skip
        _down_kernel[(blocks, -(-hidden_size // tile["BN"]))](
            hidden, down, order, weights, block_expert, block_start, expert_stop, out,
            UNITS=units, H=hidden_size, **tile,
        )  # fmt: skip
    return out.view(num_rows, chosen, hidden_size).sum(1, dtype=torch.float32).to(x.dtype)


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
