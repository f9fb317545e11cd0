"""Draws follow their probabilities and depend on their own row alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helix.sampling import SamplingParams
from tests.helix.sampling.rows import (
    make_batch,
    random_logits,
    sample,
    target_probabilities,
)


def chi_squared_limit(freedom: int) -> float:
    """The value that chi-squared exceeds with probability 1e-4 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def chi_squared(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """The statistic over the tokens that are possible, and its degrees of freedom."""
    possible = probabilities > 0
    assert int(counts[~possible].sum()) == 0, "an impossible token was drawn"
    expected = probabilities[possible].double() * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 3.0}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 8, "top_p": 0.9, "min_p": 0.05}],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_follow_the_target_probabilities(settings: dict[str, Any], vary: str) -> None:
    num, vocabulary = 40_000, 24
    logits = random_logits(1, vocabulary, seed=2, scale=1.5).expand(num, -1)
    params = [SamplingParams(**({"temperature": 1.0} | settings))] * num
    numbers = {"seeds": [17] * num, "positions": [90] * num} | {vary: list(range(num))}
    batch = make_batch(params, numbers["seeds"], numbers["positions"])
    counts = torch.bincount(sample(logits, batch).token_ids, minlength=vocabulary)
    statistic, freedom = chi_squared(counts, target_probabilities(logits[:1], make_batch(params[:1]))[0])
    assert freedom >= 3
    assert statistic < chi_squared_limit(freedom)


def test_draws_from_a_large_flat_vocabulary_are_even() -> None:
    """Noise too coarse near its top would tie, and ties would favour low ids."""
    num, vocabulary, bins = 1000, 50_000, 20
    rounds = []
    for start in range(0, num, 100):
        batch = make_batch([SamplingParams(temperature=1.0)] * 100, positions=list(range(start, start + 100)))
        rounds.append(sample(torch.zeros(100, vocabulary), batch).token_ids)
    counts = torch.bincount(torch.cat(rounds) * bins // vocabulary, minlength=bins)
    statistic, freedom = chi_squared(counts, torch.full((bins,), 1 / bins))
    assert statistic < chi_squared_limit(freedom)


MIXED = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "logprobs": 4},
    {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    {"repetition_penalty": 1.2, "logprobs": 2},
]


@pytest.mark.parametrize("vocabulary", [257, 4099])  # odd sizes: rows start at every alignment
def test_token_and_target_do_not_depend_on_the_rest_of_the_batch(vocabulary: int) -> None:
    params = [SamplingParams(**MIXED[row % len(MIXED)]) for row in range(40)]
    logits = random_logits(40, vocabulary, seed=9)
    logits[::3] = logits[::3].to(torch.bfloat16).float()  # many ties
    tokens = [[row, row + 1, row] for row in range(40)]

    def run(rows: list[int]) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        batch = make_batch(
            [params[row] for row in rows],
            [1000 + row for row in rows],
            [7 * row for row in rows],
            prompt_token_ids=[tokens[row] for row in rows],
            output_token_ids=[tokens[row] for row in rows],
        )
        got = sample(logits[rows], batch)
        # A row gets as many alternatives as its neighbours ask for; the first ones are what it asked for.
        alternatives = [None if got.top_ids is None else got.top_ids[place] for place in range(len(rows))]
        return got.token_ids, target_probabilities(logits[rows], batch), alternatives

    together, targets, alternatives = run(list(range(40)))
    orders = [torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(3)]
    parts = [order[at : at + size] for order, size in zip(orders, (2, 5, 17), strict=True) for at in range(0, 40, size)]
    for rows in [*([row] for row in range(40)), *parts]:
        token_ids, target, tops = run(rows)
        assert torch.equal(token_ids, together[rows])
        assert torch.equal(target, targets[rows])
        for place, row in enumerate(rows):
            top, whole = tops[place], alternatives[row]
            assert top is None or (whole is not None and torch.equal(top, whole[: len(top)]))


def test_draw_repeats_for_equal_seed_and_position_and_changes_with_either() -> None:
    params = [SamplingParams(temperature=1.0)] * 200
    logits = torch.zeros(200, 1000)

    def draw(seed: int, first_position: int) -> Tensor:
        return sample(
            logits, make_batch(params, [seed] * 200, list(range(first_position, first_position + 200)))
        ).token_ids

    assert torch.equal(draw(5, 0), draw(5, 0))
    assert torch.equal(draw(5, 0)[100:], draw(5, 100)[:100])
    for other in (draw(6, 0), draw(5, 200), draw(5 + 2**32, 0), draw(5 + 2**62, 0), draw(5, 2**32)):
        assert int((draw(5, 0) == other).sum()) < 5  # by chance 0.2 of 200


@pytest.mark.parametrize("temperature", [1e-5, 1e5])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[3e38, -3e38, 2e38, -math.inf], [1e-30, 2e-30, 0.0, -math.inf]])
    batch = make_batch([SamplingParams(temperature=temperature, top_p=0.999, min_p=1e-9, logprobs=4)] * 2)
    target = target_probabilities(logits, batch)
    torch.testing.assert_close(target.sum(-1), torch.ones(2))
    assert (target[:, 3] == 0).all()
    got = sample(logits, batch)
    assert got.logprobs is not None
    assert got.logprobs.isfinite().all()
