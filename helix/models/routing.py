"""Which experts rows go through: the router's scores, the choice, the experts that leaves in use, or their queues.

Every rank routes all rows alike and keeps what concerns its own experts. Kernels and reference choose the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel.device import early

from .linear import ExpertsInUse
from .spec import Experts

MOST_WARPS = 16


def logits_of(x: torch.Tensor, router: torch.Tensor, score_bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the router's scores [R, all experts] in float32 at least: products of x's dtype are exact in it.

    ``score_bias``, [all experts] float32, is part of them.

    Rounded to 2 bytes, scores of many rows would choose other experts than the float32 sums of few rows do.
    """
    if x.is_cuda and x.element_size() == 2:
        logits = torch.mm(x, router.T, out_dtype=torch.float32)
    else:
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(dtype), router.to(dtype))
    return logits if score_bias is None else logits + score_bias


def route(
    x: torch.Tensor,
    router: torch.Tensor,
    experts: Experts,
    bias: torch.Tensor | None = None,
    score_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each row's experts: their weights [R, C] float32 and ids [R, C] int64, equal on all ranks.

    Args:
        x: [R, h], equal on all ranks.
        router: [all experts, h].
        experts: how many are chosen, and how.
        bias: [all experts] float32, where experts are chosen by sigmoid.
        score_bias: [all experts] float32, part of the scores.
    """
    logits = logits_of(x, router, score_bias)
    scores = logits.float().sigmoid() if experts.sigmoid else logits.float().softmax(-1)
    choice = scores if bias is None else scores + bias
    if experts.groups > 1:
        per_group = choice.unflatten(-1, (experts.groups, -1))
        best = per_group.topk(min(2 if experts.sigmoid else 1, per_group.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(experts.groups_chosen, -1).indices, True)
        choice = per_group.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    ids = choice.topk(experts.num_chosen, -1).indices
    weights = scores.gather(-1, ids)
    if experts.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * experts.scale, ids


@triton.jit
def _in_best_groups(choice, e, SIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, PAIRS: tl.constexpr):
    """Return ``choice`` [rows, experts], -inf outside the KEPT best groups of SIZE neighbours.

    A group counts as its best expert, or with PAIRS as the sum of its best two.
    """
    group = e // SIZE
    best = tl.where(choice == choice, float("-inf"), float("-inf"))
    for g in tl.static_range(GROUPS):
        its = (group == g)[None, :]
        mine = tl.where(its, choice, float("-inf"))
        top = tl.max(mine, 1)
        if PAIRS:
            at = tl.min(tl.where(mine == top[:, None], e[None, :], GROUPS * SIZE), 1)
            top += tl.max(tl.where(e[None, :] == at[:, None], float("-inf"), mine), 1)
        best = tl.where(its, top[:, None], best)
    left = best
    for _ in range(KEPT):
        at = tl.min(tl.where(left == tl.max(left, 1)[:, None], group[None, :], GROUPS), 1)
        left = tl.where(group[None, :] == at[:, None], float("-inf"), left)
    return tl.where((left == float("-inf")) & (best > float("-inf")), choice, float("-inf"))


@triton.jit
def _choose(
    logits, bias, scale, r, e, num_rows,
    SUMMANDS: tl.constexpr, ALL: tl.constexpr, CHOSEN: tl.constexpr, NORMALISED: tl.constexpr, SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_CHOSEN: tl.constexpr,
):  # fmt: skip
    """Return which experts ``e`` the rows ``r`` choose, and their weights: [rows, experts], zero where not chosen.

    It is compiled as Triton and as Gluon, where layouts follow from those of ``r`` and ``e``.
    """
    here = (r < num_rows)[:, None] & (e < ALL)[None, :]
    score = tl.where(here, 0.0, 0.0)
    for s in tl.static_range(SUMMANDS):
        score += tl.load(logits + (s * num_rows + r)[:, None] * ALL + e[None, :], mask=here, other=0.0).to(tl.float32)
    score = tl.where((e < ALL)[None, :], score, float("-inf"))
    if SIGMOID:
        value = 1.0 / (1.0 + tl.exp(-score))
        choice = tl.where((e < ALL)[None, :], value + tl.load(bias + e, mask=e < ALL, other=0.0)[None, :], score)
    else:
        value = tl.exp(score - tl.max(score, 1)[:, None])
        choice = score
    if GROUPS > 1:
        choice = _in_best_groups(choice, e, ALL // GROUPS, GROUPS, GROUPS_CHOSEN, SIGMOID and ALL // GROUPS > 1)
    left = choice
    for _ in range(CHOSEN):  # the lowest of equals, as top-k does on GPUs
        at = tl.min(tl.where(left == tl.max(left, 1)[:, None], e[None, :], ALL), 1)
        left = tl.where(e[None, :] == at[:, None], float("-inf"), left)
    chosen = (left == float("-inf")) & (choice > float("-inf"))  # CHOSEN at most, of scores that are no numbers none
    if NORMALISED:
        value = value / tl.sum(tl.where(chosen, value, 0.0), 1)[:, None]
    elif not SIGMOID:
        value = value / tl.sum(value, 1)[:, None]
    chosen &= here
    return chosen, tl.where(chosen, value * scale, 0.0)


@triton.jit
def weigh_rows(
    logits, bias, scale, row_weights, r, e, num_rows, first,
    SUMMANDS: tl.constexpr, ALL: tl.constexpr, HELD: tl.constexpr, CHOSEN: tl.constexpr, NORMALISED: tl.constexpr,
    SIGMOID: tl.constexpr, GROUPS: tl.constexpr, GROUPS_CHOSEN: tl.constexpr,
):  # fmt: skip
    """Write what all rows ``r`` choose of all experts ``e``; return which of these are this rank's and in use, as 1."""
    _, weight = _choose(
        logits, bias, scale, r, e, num_rows, SUMMANDS, ALL, CHOSEN, NORMALISED, SIGMOID, GROUPS, GROUPS_CHOSEN
    )
    held = (e >= first) & (e < first + HELD)
    to = row_weights + (e - first)[None, :] * num_rows + r[:, None]
    tl.store(to, weight, mask=(r < num_rows)[:, None] & held[None, :])
    return ((tl.max(weight, 0) > 0.0) & held).to(tl.int32)


@triton.jit
def list_used(ids, count, used, e, first):
    """Write the experts in use, of what ``weigh_rows`` returned."""
    tl.store(ids + tl.cumsum(used, 0) - used, e - first, mask=used > 0)
    tl.store(count, tl.sum(used, 0))


@gluon.jit
def _in_use_kernel(
    logits, bias, scale, ids, count, row_weights, num_rows, first,
    SUMMANDS: gl.constexpr, ALL: gl.constexpr, ALL_PAD: gl.constexpr, HELD: gl.constexpr, CHOSEN: gl.constexpr,
    NORMALISED: gl.constexpr, SIGMOID: gl.constexpr, GROUPS: gl.constexpr, GROUPS_CHOSEN: gl.constexpr,
    BR: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program for all rows: what they choose, and which of this rank's experts that leaves in use.

    A row stays within a warp, so that the best of its scores are found without a word to another.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    SIDE_BY_SIDE: gl.constexpr = max(1, min(4, ALL_PAD // 32))
    rows: gl.constexpr = gl.BlockedLayout([1, SIDE_BY_SIDE], [1, 32], [WARPS, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    r, e = gl.arange(0, BR, layout=gl.SliceLayout(1, rows)), gl.arange(0, ALL_PAD, layout=gl.SliceLayout(0, rows))
    used = weigh_rows(
        logits, bias, scale, row_weights, r, e, num_rows, first,
        SUMMANDS, ALL, HELD, CHOSEN, NORMALISED, SIGMOID, GROUPS, GROUPS_CHOSEN,
    )  # fmt: skip
    list_used(ids, count, gl.convert_layout(used, line), gl.arange(0, ALL_PAD, layout=line), first)


@triton.jit
def queue_kernel(
    logits, bias, scale, weights, counts, queues, num_rows, first,
    ALL: tl.constexpr, ALL_PAD: tl.constexpr, HELD: tl.constexpr, CHOSEN: tl.constexpr, NORMALISED: tl.constexpr,
    SIGMOID: tl.constexpr, GROUPS: tl.constexpr, GROUPS_CHOSEN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """What BR rows choose: their pairs join the queues of this rank's experts, in any order."""
    r, e = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, ALL_PAD)
    chosen, weight = _choose(
        logits, bias, scale, r, e, num_rows, 1, ALL, CHOSEN, NORMALISED, SIGMOID, GROUPS, GROUPS_CHOSEN
    )
    held = (e >= first) & (e < first + HELD)
    one = chosen.to(tl.int32)
    pair = r[:, None] * CHOSEN + tl.cumsum(one, 1) - one
    tl.store(weights + pair, tl.where(held[None, :], weight, 0.0), mask=chosen)
    joins = tl.where(held[None, :], one, 0)
    num = tl.sum(joins, 0)
    start = tl.atomic_add(counts + e - first, num, mask=num > 0, sem="relaxed")
    at = (e - first).to(tl.int64)[None, :] * num_rows + start[None, :] + tl.cumsum(joins, 0) - joins
    tl.store(queues + at, pair, mask=joins > 0)


def experts_in_use(
    logits: torch.Tensor,
    num_held: int,
    experts: Experts,
    *,
    first: int,
    bias: torch.Tensor | None = None,
    pdl: bool = False,
) -> ExpertsInUse:
    """Do what ``route`` does for few rows, and list the experts in use, in one launch.

    Args:
        logits: [S, R, all experts], the router's, whose sum over S counts.
        num_held: E.
        experts: how many are chosen, and how.
        first: the id of this rank's first expert.
        bias: [all experts] float32, where experts are chosen by sigmoid.
        pdl: launch programmatically dependent.
    """
    summands, rows, _ = logits.shape
    ids = torch.empty(min(num_held, rows * experts.num_chosen), dtype=torch.int32, device=logits.device)
    count, row_weights = ids.new_empty(1), ids.new_empty((num_held, rows), dtype=torch.float32)
    rows_padded = triton.next_power_of_2(rows)
    warps = min(MOST_WARPS, rows_padded)
    _in_use_kernel[(1,)](
        logits, logits if bias is None else bias, experts.scale, ids, count, row_weights, rows, first,
        SUMMANDS=summands, HELD=num_held, BR=rows_padded, WARPS=warps, **rule_of(experts), num_warps=warps,
        **early(pdl),
    )  # fmt: skip
    expected = num_held * (1 - (1 - experts.num_chosen / experts.num_experts) ** rows)
    return ExpertsInUse(ids, count, row_weights, expected)


def rule_of(experts: Experts) -> dict[str, int | bool]:
    """Return how experts are chosen, as the kernels are compiled for it."""
    return {
        "ALL": experts.num_experts,
        "ALL_PAD": triton.next_power_of_2(experts.num_experts),
        "CHOSEN": experts.num_chosen,
        "NORMALISED": experts.normalised,
        "SIGMOID": experts.sigmoid,
        "GROUPS": experts.groups,
        "GROUPS_CHOSEN": experts.groups_chosen,
    }
