"""Choose the next token of every row: greedy, or drawn by temperature, top-k, top-p, min-p and penalties.

Every rank holds the same logits and runs this module by itself, so a choice must be a function of the row's logits, its
request's settings, its seed and its position, and of nothing else: not of the rows beside it, of a generator's history
or of the order of a floating-point sum. Hence
  - the noise is a hash of (seed, position, stream, index): there is no generator whose state could drift apart;
  - sums over the vocabulary add 64-bit fixed-point weights, which give the same bits in every order;
  - ties go to the lowest token id.

Shape letters: B rows, V vocabulary size. Log-probabilities are natural logarithms.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .noise import TOKEN_STREAM, gumbel, row_keys
from .sampling import SEED_LIMIT, SamplingParams

_WEIGHT_ONE = 2.0**40  # a weight of 1 in fixed point: 2**22 tokens of weight 1 still add up to less than 2**63
_LOW_32 = 0xFFFFFFFF


@dataclass(kw_only=True, slots=True, frozen=True, eq=False)
class Penalties:
    """Penalised (row, token) pairs: M seen in a prompt or output, U distinct pairs of an output. All on one device."""

    seen_rows: Tensor  # [M] int64
    seen_ids: Tensor  # [M] int64, repeats allowed
    repetition: Tensor  # [M] float32, divides positive logits and multiplies the others
    output_rows: Tensor  # [U] int64
    output_ids: Tensor  # [U] int64, distinct within a row
    subtract: Tensor  # [U] float32, presence_penalty + count * frequency_penalty


@dataclass(kw_only=True, slots=True, frozen=True, eq=False)
class SamplingBatch:
    """Settings of the B rows that are sampled together, and which features any of them uses.

    A greedy row has temperature 1, noise scale 0 and every filter off: argmax(logits / 1 + 0 * noise).
    """

    num_rows: int
    all_greedy: bool
    any_greedy: bool
    max_top_k: int  # 0: no row uses top-k
    uses_top_p: bool
    uses_min_p: bool
    num_logprobs: int | None  # the most alternatives any row asks for; None: no row wants log-probabilities
    temperature: Tensor  # [B] float32
    noise_scale: Tensor  # [B] float32, 1 or 0 (greedy)
    top_p: Tensor  # [B] float32, inf: off
    log_min_p: Tensor  # [B] float32, -inf: off
    top_k: Tensor  # [B] int64, 0: off
    seeds: Tensor  # [B] int64
    positions: Tensor  # [B] int64, of the token to be sampled
    noise_keys: Tensor  # [2, B] int64; [0, B] when all rows are greedy
    biases: tuple[Tensor, Tensor, Tensor] | None  # rows and ids [E] int64, distinct pairs; what is added, float32
    penalties: Penalties | None

    @classmethod
    def from_requests(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        positions: Sequence[int],
        *,
        prompt_token_ids: Sequence[Sequence[int] | NDArray[np.int64] | None] | None = None,
        output_token_ids: Sequence[Iterable[int] | None] | None = None,
        biases: Sequence[Mapping[int, float]] | None = None,
        device: torch.device | str = "cpu",
    ) -> "SamplingBatch":
        """Build the batch whose row i samples the token at positions[i] of a request with params[i] and seeds[i].

        Only rows with a repetition penalty need prompt ids, and only rows with any penalty need output ids; other
        entries may be None. Order and repeats within a prompt do not matter: for a long prompt pass its distinct ids
        as an int64 array made once. An output may be given as a Counter. ``biases`` are added to each row's logits
        before anything else, by token id; -inf rules a token out.
        Raises ValueError when lengths differ, a seed is outside [0, 2**63), or a penalised row has no ids.
        """
        if not len(params) == len(seeds) == len(positions):
            raise ValueError(
                f"params, seeds, positions = {len(params)}, {len(seeds)}, {len(positions)} entries must be equally many"
            )
        for row, seed in enumerate(seeds):
            if not 0 <= seed < SEED_LIMIT:
                raise ValueError(f"seeds[{row}] = {seed} must lie in [0, 2**63)")
        random = [not p.is_greedy for p in params]
        top_k = [p.top_k * on for p, on in zip(params, random, strict=True)]
        top_p = [p.top_p if on and p.top_p < 1 else math.inf for p, on in zip(params, random, strict=True)]
        min_p = [math.log(p.min_p) if on and p.min_p > 0 else -math.inf for p, on in zip(params, random, strict=True)]
        temperature = [p.temperature if on else 1.0 for p, on in zip(params, random, strict=True)]
        integers = torch.tensor([list(seeds), list(positions), top_k], dtype=torch.int64)
        if any(random):  # many tiny steps: cheaper here than as kernels
            integers = torch.cat((integers, row_keys(integers[0], integers[1], TOKEN_STREAM)))
        integers = integers.to(device, non_blocking=True)
        floats = torch.tensor([temperature, [float(on) for on in random], top_p, min_p], dtype=torch.float32)
        floats = floats.to(device, non_blocking=True)
        return cls(
            num_rows=len(params),
            all_greedy=not any(random),
            any_greedy=not all(random),
            max_top_k=max(top_k, default=0),
            uses_top_p=any(p < math.inf for p in top_p),
            uses_min_p=any(p > -math.inf for p in min_p),
            num_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
            temperature=floats[0],
            noise_scale=floats[1],
            top_p=floats[2],
            log_min_p=floats[3],
            top_k=integers[2],
            seeds=integers[0],
            positions=integers[1],
            noise_keys=integers[3:],
            biases=_biases(biases or (), device),
            penalties=_penalties(params, prompt_token_ids, output_token_ids, device),
        )


@dataclass(kw_only=True, slots=True, frozen=True, eq=False)
class SampledTokens:
    """One token a row. Log-probabilities are log_softmax of the logits as given: before penalties and temperature.

    n is the most alternatives that any row asked for (at most V); the alternatives go from the most to the least
    probable, ties to the lowest id first, so a row that asked for fewer reads its first ones.
    """

    token_ids: Tensor  # [B] int64
    logprobs: Tensor | None  # [B] float32, of token_ids; None: no row asked
    top_ids: Tensor | None  # [B, n] int64; None: n = 0
    top_logprobs: Tensor | None  # [B, n] float32; None: n = 0

    @classmethod
    def plain(cls, token_ids: Sequence[int]) -> "SampledTokens":
        """Return tokens that were chosen elsewhere, on the host and without log-probabilities."""
        return cls(token_ids=torch.tensor(token_ids, dtype=torch.int64), logprobs=None, top_ids=None, top_logprobs=None)


def sample(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """Choose one token a row from logits [B, V] float32, which stay as they are.

    Every rank may call it by itself: equal logits and batches give equal tokens. Raises ValueError on a wrong shape or
    dtype. Drawing is Gumbel-max: argmax(log p + Gumbel noise) has the distribution p.
    """
    scores = _scores(logits, batch)
    if not batch.all_greedy:
        noise = gumbel(batch.noise_keys, logits.shape[1])
        if batch.any_greedy:
            noise.mul_(batch.noise_scale[:, None])
        scores = noise.add_(scores)
    token_ids = scores.argmax(dim=-1)
    if batch.num_logprobs is None:
        return SampledTokens(token_ids=token_ids, logprobs=None, top_ids=None, top_logprobs=None)
    log_total = _log_total(logits)
    logprobs = logits.gather(1, token_ids[:, None]) - log_total
    top_ids = top_logprobs = None
    if batch.num_logprobs > 0:
        top_ids = _top_ids(logits, min(batch.num_logprobs, logits.shape[1]))
        top_logprobs = logits.gather(1, top_ids) - log_total
    return SampledTokens(token_ids=token_ids, logprobs=logprobs[:, 0], top_ids=top_ids, top_logprobs=top_logprobs)


def target_probabilities(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Return [B, V] float32, the distribution that `sample` draws from; a greedy row is one-hot.

    logits [B, V] float32 stay as they are. The bits of a row do not depend on the other rows.
    """
    scores = _scores(logits, batch)
    one_hot = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=-1, keepdim=True), 1.0)
    if batch.all_greedy:
        return one_hot
    weights = scores.exp_()  # the greatest of a row is 1
    total = _to_fixed_point(weights).sum(dim=-1, keepdim=True).to(torch.float32).div_(_WEIGHT_ONE)
    return torch.where(batch.noise_scale[:, None] > 0, weights.div_(total), one_hot)


def _scores(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Penalise, scale and filter: [B, V] float32; random rows have maximum 0, and -inf where a token is ruled out."""
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[0] != batch.num_rows:
        raise ValueError(f"logits = {logits.dtype} {list(logits.shape)} must be float32 [{batch.num_rows}, vocabulary]")
    if batch.biases is not None:
        rows, ids, values = batch.biases
        logits = logits.index_put((rows, ids), values, accumulate=True)
    if batch.penalties is not None:
        logits = _penalise(logits, batch.penalties)
    if batch.all_greedy:
        return logits
    scores = logits - logits.amax(dim=-1, keepdim=True)  # first, so that a small temperature cannot overflow
    _filter_(scores.div_(batch.temperature[:, None]), batch)
    return scores


def _penalise(logits: Tensor, penalties: Penalties) -> Tensor:
    seen = (penalties.seen_rows, penalties.seen_ids)
    values = logits[seen]
    scaled = torch.where(values > 0, values / penalties.repetition, values * penalties.repetition)
    logits = logits.index_put(seen, scaled)  # a repeated pair writes the same value again
    output = (penalties.output_rows, penalties.output_ids)
    return logits.index_put_(output, logits[output] - penalties.subtract)


def _filter_(scores: Tensor, batch: SamplingBatch) -> None:
    """Set to -inf, in place, what top-k, then top-p, then min-p rule out; tokens equal to the k-th are kept."""
    max_top_k = min(batch.max_top_k, scores.shape[1])
    if batch.uses_top_p:
        ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
        if max_top_k:
            _keep_top_k_(ordered, ordered, batch.top_k)
        weights = _to_fixed_point(ordered.exp())
        total = weights.cumsum(dim=-1)
        needed = (batch.top_p.to(torch.float64) * total[:, -1]).ceil_().clamp_(max=2.0**62).to(torch.int64)
        ordered.masked_fill_(total.sub_(weights) >= needed[:, None], -math.inf)  # the tokens before it were enough
        scores.scatter_(1, ids, ordered)
    elif max_top_k:
        _keep_top_k_(scores, scores.topk(max_top_k, dim=-1).values, batch.top_k)
    if batch.uses_min_p:
        scores.masked_fill_(scores < batch.log_min_p[:, None], -math.inf)


def _keep_top_k_(scores: Tensor, ordered: Tensor, top_k: Tensor) -> None:
    """Set to -inf what lies below the k-th of `ordered`, the leading scores of every row in descending order."""
    kth = ordered.gather(1, (top_k - 1).clamp_(0, ordered.shape[1] - 1)[:, None])
    scores.masked_fill_(scores < kth.masked_fill_(top_k[:, None] == 0, -math.inf), -math.inf)


def _to_fixed_point(weights: Tensor) -> Tensor:
    return (weights * _WEIGHT_ONE).to(torch.int64)


def _log_total(logits: Tensor) -> Tensor:
    """Return logsumexp of each row, [B, 1] float32, equal bits whatever the other rows."""
    top = logits.amax(dim=-1, keepdim=True)
    total = _to_fixed_point((logits - top).exp_()).sum(dim=-1, keepdim=True)
    return top + total.to(torch.float32).div_(_WEIGHT_ONE).log_()


def _top_ids(logits: Tensor, num: int) -> Tensor:
    """Return the ids [B, num] of the largest logits; keys of (logit, id) as one integer leave no ties."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, its equal
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64).bitwise_left_shift_(32)
    keys += torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    return logits.shape[1] - 1 - (keys.topk(num, dim=-1).values & _LOW_32)


def _biases(biases: Sequence[Mapping[int, float]], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor] | None:
    entries = [(row, token, value) for row, each in enumerate(biases) for token, value in each.items()]
    if not entries:
        return None
    rows, ids, values = torch.tensor(entries, dtype=torch.float64).unbind(1)
    return rows.to(device, torch.int64), ids.to(device, torch.int64), values.to(device, torch.float32)


def _penalties(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int] | NDArray[np.int64] | None] | None,
    outputs: Sequence[Iterable[int] | None] | None,
    device: torch.device | str,
) -> Penalties | None:
    """Gather the penalised pairs of all rows, or None when there are none."""
    seen_ids: list[NDArray[np.int64]] = []
    seen_by: list[tuple[int, float]] = []  # row and penalty of each array in seen_ids
    subtract: list[tuple[int, int, float]] = []
    for row, p in enumerate(params):
        repeats, counts = p.repetition_penalty != 1, p.presence_penalty != 0 or p.frequency_penalty != 0
        if not repeats and not counts:
            continue
        prompt = prompts[row] if prompts is not None else None
        output = outputs[row] if outputs is not None else None
        if output is None or (repeats and prompt is None):
            raise ValueError(f"row {row} has a penalty and needs its {'prompt and ' * repeats}output token ids")
        tally = {i: n for i, n in Counter(output).items() if n > 0}
        if repeats:
            seen_ids += [np.asarray(prompt, dtype=np.int64), np.fromiter(tally, dtype=np.int64, count=len(tally))]
            seen_by += [(row, p.repetition_penalty)] * 2
        if counts:
            subtract += [(row, i, p.presence_penalty + n * p.frequency_penalty) for i, n in tally.items()]
    if not seen_ids and not subtract:
        return None
    sizes = torch.tensor([len(ids) for ids in seen_ids], dtype=torch.int64)
    rows, values = torch.tensor(seen_by, dtype=torch.float64).reshape(-1, 2).repeat_interleave(sizes, dim=0).unbind(1)
    output_rows, output_ids, amounts = torch.tensor(subtract, dtype=torch.float64).reshape(-1, 3).unbind(1)
    ids = torch.from_numpy(np.concatenate([*seen_ids, np.empty(0, dtype=np.int64)]))
    return Penalties(
        seen_rows=rows.to(device, torch.int64),
        seen_ids=ids.to(device),
        repetition=values.to(device, torch.float32),
        output_rows=output_rows.to(device, torch.int64),
        output_ids=output_ids.to(device, torch.int64),
        subtract=amounts.to(device, torch.float32),
    )
