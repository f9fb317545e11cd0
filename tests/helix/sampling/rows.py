"""Rows that choose tokens, a slow oracle of what they may choose, and the kernels' choice."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helix import choose_kernels
from helix.choice import FILTERED, NOISE, RowSettings, Rules, choose
from helix.filters import kept
from helix.logprobs import SampledTokens, with_logprobs
from helix.penalty_kernels import penalise
from helix.sampling import SamplingParams
from helix.token_counts import IN_PROMPT

Tokens = Sequence[int]

CPU = torch.device("cpu")

KERNELS_ON = "cuda" if torch.cuda.is_available() else "cpu"  # there by Triton's interpreter


@dataclass
class Batch:
    """Rows that are sampled together, and what they have made so far."""

    params: Sequence[SamplingParams]
    seeds: Sequence[int]
    positions: Sequence[int]
    prompts: Sequence[Tokens]
    outputs: Sequence[Tokens]

    @property
    def settings(self) -> RowSettings:
        return RowSettings.of(Rules(self.params), self.seeds, self.positions, CPU)

    def penalised(self, logits: Tensor) -> Tensor:
        counts = torch.zeros(logits.shape, dtype=torch.int32)
        for row, (prompt, output) in enumerate(zip(self.prompts, self.outputs, strict=True)):
            counts[row, list(prompt)] = IN_PROMPT * (self.params[row].repetition_penalty != 1)
            for token in output:
                counts[row, token] += 1
        slots = torch.tensor([row if each.has_penalties else -1 for row, each in enumerate(self.params)])
        amounts = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in self.params]
        drafts = torch.zeros((len(slots), 0), dtype=torch.int64)
        return penalise(logits, counts, slots, torch.tensor(amounts, dtype=torch.float64).T, drafts, 0)


def make_batch(
    params: Sequence[SamplingParams],
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    prompt_token_ids: Sequence[Tokens | None] | None = None,
    output_token_ids: Sequence[Tokens | None] | None = None,
) -> Batch:
    rows = range(len(params))
    prompts = [each or () for each in prompt_token_ids or [()] * len(params)]
    outputs = [each or () for each in output_token_ids or [()] * len(params)]
    return Batch(params, seeds or list(rows), positions or [100 + row for row in rows], prompts, outputs)


def sample(logits: Tensor, batch: Batch) -> SampledTokens:
    tokens = choose(batch.penalised(logits), batch.settings)
    wanted = [each.logprobs for each in batch.params if each.logprobs is not None]
    return with_logprobs(tokens, logits, max(wanted)) if wanted else SampledTokens(token_ids=tokens)


def target_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """The distribution that is drawn from, [B, V]: what filters keep, scaled up; one-hot for greedy rows."""
    logits, settings = batch.penalised(logits), batch.settings
    few = kept(logits, settings.floats, settings.doubles, settings.integers)
    few |= (settings.integers[0] & FILTERED == 0)[:, None]
    heat = (logits - logits.amax(-1, keepdim=True)).double() * settings.floats[0][:, None]
    drawn = heat.masked_fill(~few, -math.inf).softmax(-1)
    one_hot = torch.zeros_like(drawn).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where((settings.integers[0] & NOISE > 0)[:, None], drawn, one_hot).float()


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(logits: Tensor, params: SamplingParams, prompt: Tokens = (), output: Tokens = ()) -> np.ndarray:
    """The target distribution of one row [V], step by step in float64."""
    x = logits.double().tolist()
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token, count in Counter(output).items():
        x[token] -= params.presence_penalty + count * params.frequency_penalty
    if params.temperature == 0:
        return np.eye(len(x))[x.index(max(x))]
    x = [value / params.temperature for value in x]
    kept = set(range(len(x)))
    if params.top_k:
        kth = sorted(x, reverse=True)[: params.top_k][-1]
        kept = {token for token in kept if x[token] >= kth}
    weight = {token: math.exp(x[token] - max(x)) for token in kept}
    reached, nucleus = 0.0, set()
    for token in sorted(kept, key=lambda token: (-x[token], token)):
        nucleus.add(token)
        reached += weight[token] / sum(weight.values())
        if params.top_p < 1 and reached >= params.top_p:
            nucleus |= {other for other in kept if x[other] == x[token]}
            break
    kept = {token for token in nucleus if weight[token] >= params.min_p}
    total = sum(weight[token] for token in kept)
    return np.array([weight[token] / total if token in kept else 0.0 for token in range(len(x))])


def assert_follows_oracle(params: Sequence[SamplingParams], logits: Tensor, **tokens: Any) -> Tensor:
    got = target_probabilities(logits, make_batch(params, **tokens))
    prompts = tokens.get("prompt_token_ids") or [()] * len(params)
    outputs = tokens.get("output_token_ids") or [()] * len(params)
    for row, one in enumerate(params):
        want = oracle(logits[row], one, prompts[row] or (), outputs[row] or ())
        seen = (want == 0) | (want > 1e-30)  # below, float32 may underflow
        np.testing.assert_array_equal((got[row].numpy() > 0)[seen], (want > 0)[seen], err_msg=f"row {row}: {one}")
        np.testing.assert_allclose(got[row].numpy(), want, rtol=2e-5, atol=1e-9, err_msg=f"row {row}: {one}")
    return got


def kernel_logits(kind: str, rows: int, vocabulary: int) -> Tensor:
    logits = random_logits(rows, vocabulary, seed=len(kind))
    if kind == "tied":
        return logits.round()
    if kind == "banned":
        logits[:, ::3] = -math.inf
    return logits * {"flat": 0.0, "peaked": 5.0}.get(kind, 1.0)


def chosen_by_kernels(logits: Tensor, settings: RowSettings, device: str) -> Tensor:
    given = (settings.floats, settings.doubles, settings.integers)
    return choose_kernels.choose(logits.to(device), *(each.to(device) for each in given)).cpu()
