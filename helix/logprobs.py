"""Log-probabilities of chosen tokens and of the most likely ones, from the logits as the model gave them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mass import ORDERS_PER_NAT, mass

_ONE = 2.0**40
_LOW_32 = 0xFFFFFFFF


@dataclass(kw_only=True, slots=True, frozen=True, eq=False)
class SampledTokens:
    """One token a row. Log-probabilities are log_softmax of the logits as given: before penalties and temperature.

    n is the most alternatives that any row asked for (at most V); the alternatives go from the most to the least
    probable, ties to the lowest id first, so a row that asked for fewer reads its first ones.
    """

    token_ids: Tensor  # [R] int64
    logprobs: Tensor | None = None  # [R] float32, of token_ids; None: no row asked
    top_ids: Tensor | None = None  # [R, n] int64; None: n = 0
    top_logprobs: Tensor | None = None  # [R, n] float32; None: n = 0

    @classmethod
    def plain(cls, token_ids: list[int]) -> SampledTokens:
        """Return tokens that are known on the host, without log-probabilities."""
        return cls(token_ids=torch.tensor(token_ids, dtype=torch.int64))


def with_logprobs(token_ids: Tensor, logits: Tensor, num: int) -> SampledTokens:
    """Return tokens [R] with their log-probabilities and ``num`` alternatives each; logits are [R, V] float32."""
    log_total = _log_total(logits)
    logprobs = logits.gather(1, token_ids[:, None]) - log_total
    top_ids = top_logprobs = None
    if num > 0:
        top_ids = _top_ids(logits, min(num, logits.shape[1]))
        top_logprobs = logits.gather(1, top_ids) - log_total
    return SampledTokens(token_ids=token_ids, logprobs=logprobs[:, 0], top_ids=top_ids, top_logprobs=top_logprobs)


def _log_total(logits: Tensor) -> Tensor:
    """Return logsumexp of each row, [R, 1] float32, equal bits whatever the other rows."""
    top = logits.amax(dim=-1, keepdim=True)
    total = mass((top - logits) * ORDERS_PER_NAT).sum(dim=-1, keepdim=True)
    return top + total.to(torch.float32).div_(_ONE).log_()


def _top_ids(logits: Tensor, num: int) -> Tensor:
    """Return the ids [R, num] of the largest logits; keys of (logit, id) as one integer leave no ties."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, its equal
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64).bitwise_left_shift_(32)
    keys += torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return logits.shape[1] - 1 - (keys.topk(num, dim=-1).values & _LOW_32)
