"""What steps of few rows have in use of their router's scores, by the runtime's kernel, which no CPU can interpret, or
by the same functions in one that it can.
"""

import torch
import triton
import triton.language as tl

from helix.models import routing
from helix.models.linear import ExpertsInUse
from helix.models.routing import list_used, rule_of, weigh_rows
from helix.models.spec import Experts


@triton.jit
def _in_use_kernel(
    logits, bias, scale, ids, count, row_weights, num_rows, first,
    SUMMANDS: tl.constexpr, ALL: tl.constexpr, ALL_PAD: tl.constexpr, HELD: tl.constexpr, CHOSEN: tl.constexpr,
    NORMALISED: tl.constexpr, SIGMOID: tl.constexpr, GROUPS: tl.constexpr, GROUPS_CHOSEN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, ALL_PAD)
    used = weigh_rows(
        logits, bias, scale, row_weights, tl.arange(0, BR), e, num_rows, first,
        SUMMANDS, ALL, HELD, CHOSEN, NORMALISED, SIGMOID, GROUPS, GROUPS_CHOSEN,
    )  # fmt: skip
    list_used(ids, count, used, e, first)


def experts_in_use(
    logits: torch.Tensor, num_held: int, experts: Experts, *, first: int, bias: torch.Tensor | None = None
) -> ExpertsInUse:
    """As ``helix.models.routing.experts_in_use``."""
    if logits.is_cuda:
        return routing.experts_in_use(logits, num_held, experts, first=first, bias=bias)
    summands, rows, _ = logits.shape
    ids = torch.empty(min(num_held, rows * experts.num_chosen), dtype=torch.int32)
    count, row_weights = ids.new_empty(1), ids.new_empty((num_held, rows), dtype=torch.float32)
    _in_use_kernel[(1,)](
        logits, logits if bias is None else bias, experts.scale, ids, count, row_weights, rows, first,
        SUMMANDS=summands, HELD=num_held, BR=triton.next_power_of_2(rows), **rule_of(experts),
    )  # fmt: skip
    return ExpertsInUse(ids, count, row_weights, expected=num_held)
