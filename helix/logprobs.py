"""Log-probabilities of chosen tokens and of the most likely ones, from the logits as the model gave them."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .mass import ORDERS_PER_NAT, mass
from .request import TokenLogprobs
from .upload import on_its_way

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

    @property
    def on_its_way(self) -> SampledTokens:
        """Their copies on the host, which are there once the device has come so far on the current stream."""
        logprobs, top_ids, top_logprobs = (
            None if each is None else on_its_way(each) for each in (self.logprobs, self.top_ids, self.top_logprobs)
        )
        return SampledTokens(
            token_ids=on_its_way(self.token_ids), logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs
        )


def with_logprobs(token_ids: Tensor, logits: Tensor, num: int) -> SampledTokens:
    """Return tokens [R] with their log-probabilities and ``num`` alternatives each; logits are [R, V] float32."""
    log_total = _log_total(logits)
    logprobs = logits.gather(1, token_ids[:, None]) - log_total
    top_ids = top_logprobs = None
    if num > 0:
        size = logits.shape[1]
        top_ids, top_logits = in_order(best(logits, min(num, size), first=0, vocab_size=size), size)
        top_logprobs = top_logits - log_total
    return SampledTokens(token_ids=token_ids, logprobs=logprobs[:, 0], top_ids=top_ids, top_logprobs=top_logprobs)


def _log_total(logits: Tensor) -> Tensor:
    """Return logsumexp of each row, [R, 1] float32, equal bits whatever the other rows."""
    top = logits.amax(dim=-1, keepdim=True)
    total = mass((top - logits) * ORDERS_PER_NAT).sum(dim=-1, keepdim=True)
    return top + total.to(torch.float32).div_(_ONE).log_()


def best(logits: Tensor, num: int, *, first: int, vocab_size: int) -> Tensor:
    """Return keys [R, num] int64 of the largest logits, largest first, of the token ids from ``first`` on.

    A key holds logit and id, so that there are no ties; where there are fewer logits the rest is less than any key.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, its equal
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64).bitwise_left_shift_(32)
    highest = vocab_size - 1 - first
    keys += torch.arange(highest, highest - logits.shape[1], -1, device=logits.device)
    found = keys.topk(min(num, logits.shape[1]), dim=-1).values
    return F.pad(found, (0, num - found.shape[1]), value=torch.iinfo(torch.int64).min)


def in_order(keys: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the ids and the logits of keys."""
    high = (keys >> 32).to(torch.int32)
    return vocab_size - 1 - (keys & _LOW_32), torch.where(high < 0, high ^ 0x7FFFFFFF, high).view(torch.float32)


def on_host(tokens: SampledTokens, nums: Many[int]) -> list[TokenLogprobs]:
    """Return each row's log-probabilities on the host, with ``nums`` alternatives at most."""
    assert tokens.logprobs is not None
    tops: list[dict[int, float]] = [{} for _ in nums]
    if tokens.top_ids is not None and tokens.top_logprobs is not None:
        rows = zip(nums, tokens.top_ids.tolist(), tokens.top_logprobs.tolist(), strict=True)
        tops = [dict(list(zip(ids, values, strict=True))[:num]) for num, ids, values in rows]
    found = zip(tokens.token_ids.tolist(), tokens.logprobs.tolist(), tops, strict=True)
    return [TokenLogprobs(*each) for each in found]
