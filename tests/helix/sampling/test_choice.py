"""Greedy rows, filters, penalties and log-probabilities, against a slow oracle."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helix.choice import RowSettings, Rules, choose
from helix.mass import mass
from helix.sampling import SamplingParams
from tests.helix.sampling.rows import (
    CPU,
    assert_follows_oracle,
    make_batch,
    random_logits,
    sample,
    target_probabilities,
)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("others_draw", [False, True])
def test_greedy_ties_go_to_the_lowest_id(rows: int, others_draw: bool) -> None:
    logits = torch.full((rows + 1, 100_003), -1.0)
    firsts = [7 + 20_011 * row for row in range(rows)]
    for row, first in enumerate(firsts):
        logits[row, first::3] = 2.5
    params = [SamplingParams()] * rows + [SamplingParams(temperature=1.0 * others_draw)]
    assert sample(logits, make_batch(params)).token_ids[:rows].tolist() == firsts


def test_greedy_rows_beside_random_rows_are_argmax_of_the_penalised_logits() -> None:
    logits = random_logits(64, 501)
    logits[::2] = logits[::2].round()  # many ties
    outputs = [[int(row.argmax())] for row in logits]
    penalty = {"presence_penalty": 0.5}
    params = [SamplingParams(temperature=(row % 2) * 5.0, top_k=3 * (row % 2), **penalty) for row in range(64)]
    penalised = logits.clone()
    for row, (token,) in enumerate(outputs):
        penalised[row, token] -= 0.5
    got = sample(logits, make_batch(params, output_token_ids=outputs)).token_ids
    assert torch.equal(got[::2], penalised.argmax(-1)[::2])
    assert not torch.equal(got[1::2], penalised.argmax(-1)[1::2])


def test_greedy_rows_ignore_seed_and_filters() -> None:
    logits = random_logits(20, 301)
    filtered = SamplingParams(top_k=2, top_p=0.1, min_p=0.9)
    got = sample(logits, make_batch([filtered] * 19 + [SamplingParams(temperature=1.0)]))
    assert torch.equal(got.token_ids[:19], logits.argmax(-1)[:19])


def test_sampling_leaves_the_logits_as_they_are() -> None:
    logits = random_logits(2, 50)
    before = logits.clone()
    everything = SamplingParams(
        temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=2.0, presence_penalty=1.0, logprobs=3
    )
    batch = make_batch([everything, SamplingParams()], prompt_token_ids=[[1], None], output_token_ids=[[2], None])
    sample(logits, batch)
    target_probabilities(logits, batch)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": [1e-5, 0.1, 0.7, 1.0, 3.0, 1e5]},
        {"top_k": [0, 1, 2, 7, 36, 37, 38, 2**62]},
        {"top_p": [1e-30, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0]},
        {"min_p": [0.0, 1e-6, 0.05, 0.5, 1.0]},
        {"top_p": [0.5, 0.9, 1.0], "top_k": [0, 3, 10]},
        {"top_k": [0, 3, 10], "min_p": [0.0, 0.1, 0.3]},
        {"top_p": [0.5, 0.9, 1.0], "top_k": [0, 3, 10], "min_p": [0.0, 0.1, 0.3], "temperature": [0.0, 0.5, 1.0, 2.0]},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_filters_match_the_oracle(settings: dict[str, list[Any]]) -> None:
    choose = np.random.default_rng(5)
    draws = [
        {"temperature": 1.0} | {name: v[choose.integers(len(v))] for name, v in settings.items()} for _ in range(96)
    ]
    assert_follows_oracle([SamplingParams(**one) for one in draws], random_logits(96, 37, seed=len(settings)))


def test_top_k_keeps_tokens_equal_to_the_kth() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    got = assert_follows_oracle([SamplingParams(temperature=1.0, top_k=2)], logits)
    assert (got[0] > 0).tolist() == [False, True, True, True, False]


def test_top_p_keeps_tokens_as_likely_as_the_last_that_it_needs() -> None:
    logits = torch.tensor([[0.0] * 8, [1.0, 1.0, 0.0, 3.0, 1.0, 0.0, 2.0, 0.0]])
    got = assert_follows_oracle([SamplingParams(temperature=1.0, top_p=p) for p in (0.5, 0.8)], logits)
    assert (got > 0).tolist() == [[True] * 8, [True, True, False, True, True, False, True, False]]


def test_mass_is_a_power_of_two_to_27_bits_and_never_grows_with_distance() -> None:
    distance = torch.cat((torch.linspace(0, 70, 100_001), torch.tensor([math.inf])))
    found = mass(distance)
    exact = torch.exp2(-distance.double())
    assert float(((found.double() / 2**40 - exact) / exact)[distance < 12].abs().max()) < 2**-20  # steps of distance
    assert int(found[0]) == 2**40 - 2**8 and (found[distance >= 40] == 0).all()
    assert (found.diff() <= 0).all()


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    got = assert_follows_oracle([SamplingParams(temperature=1.0, top_k=2, top_p=0.55)], logits)
    assert got[0].tolist() == [1.0, 0.0, 0.0, 0.0]  # 0.4 of 0.7 is enough, 0.4 of 1.0 would not be


def test_top_p_of_one_keeps_the_faintest_token_whoever_shares_the_batch() -> None:
    logits = torch.tensor([[0.0, -60.0, -61.0]]).repeat(2, 1)
    got = target_probabilities(
        logits, make_batch([SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)])
    )
    assert (got > 0).tolist() == [[True, True, True], [True, False, False]]


def test_penalties_match_the_oracle() -> None:
    choose = np.random.default_rng(6)
    params, prompts, outputs = [], [], []
    for _ in range(64):
        params.append(
            SamplingParams(
                temperature=float(choose.choice([0.0, 1.0])),
                repetition_penalty=float(choose.choice([1.0, 0.5, 1.3, 100.0])),
                presence_penalty=float(choose.choice([0.0, -2.0, 1.0])),
                frequency_penalty=float(choose.choice([0.0, -0.5, 0.7])),
                top_k=int(choose.choice([0, 5])),
            )
        )
        prompts.append(choose.integers(31, size=choose.integers(20)).tolist())
        outputs.append(choose.integers(31, size=choose.integers(20)).tolist())
    assert_follows_oracle(params, random_logits(64, 31), prompt_token_ids=prompts, output_token_ids=outputs)


def test_presence_and_frequency_penalties_disregard_the_prompt() -> None:
    logits = random_logits(1, 9)
    plain = target_probabilities(logits, make_batch([SamplingParams(temperature=1.0)]))
    params = [SamplingParams(temperature=1.0, presence_penalty=2.0, frequency_penalty=2.0)]
    prompt_only = make_batch(params, prompt_token_ids=[[1, 2, 3]], output_token_ids=[[]])
    assert torch.equal(target_probabilities(logits, prompt_only), plain)


def test_logprobs_are_log_softmax_of_the_raw_logits() -> None:
    logits = random_logits(6, 1001)
    params = [SamplingParams(temperature=0.5, top_k=3, presence_penalty=2.0, logprobs=5)] * 3
    params += [SamplingParams(logprobs=5)] * 3
    got = sample(logits, make_batch(params, output_token_ids=[[int(row.argmax())] for row in logits]))
    want = logits.double().log_softmax(-1)
    assert got.logprobs is not None
    assert got.top_ids is not None
    assert got.top_logprobs is not None
    assert got.logprobs.dtype == got.top_logprobs.dtype == torch.float32
    torch.testing.assert_close(
        got.logprobs.double(), want.gather(1, got.token_ids[:, None])[:, 0], rtol=1e-5, atol=2e-6
    )
    top = want.topk(5)
    assert torch.equal(got.top_ids, top.indices)
    torch.testing.assert_close(got.top_logprobs.double(), top.values, rtol=1e-5, atol=2e-6)


def test_equal_alternatives_come_lowest_id_first() -> None:
    logits = torch.tensor(
        [[0.0, 2.0, -1.0, 2.0, -0.0, 2.0, 0.0, -1.0], [-3.0, -5.0, -3.0, -3.5, -3.0, -4.0, -4.0, -9.0]]
    )
    got = sample(logits, make_batch([SamplingParams(logprobs=8)] * 2))
    assert got.top_ids is not None
    assert got.top_ids.tolist() == [[1, 3, 5, 0, 4, 6, 2, 7], [0, 2, 4, 3, 5, 6, 1, 7]]


@pytest.mark.parametrize(
    ("asked", "num"),
    [([None, None], None), ([None, 0], 0), ([0, 3], 3), ([2, 5], 5), ([None, 99], 11)],
)
def test_batch_returns_the_most_alternatives_any_row_asks_for(asked: list[int | None], num: int | None) -> None:
    got = sample(random_logits(2, 11), make_batch([SamplingParams(logprobs=one) for one in asked]))
    assert (got.logprobs is None) == (num is None)
    assert (None if got.top_ids is None else got.top_ids.shape[1]) == (num or None)
    assert (None if got.top_logprobs is None else got.top_logprobs.shape[1]) == (num or None)


def test_settings_of_unequal_lengths_or_a_bad_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="params, seeds, positions = 1, 2, 1 entries must be equally many"):
        RowSettings.of(Rules([SamplingParams()]), [1, 2], [3], CPU)
    with pytest.raises(ValueError, match=r"seeds\[0\] = 9223372036854775808 must lie in \[0, 2\*\*63\)"):
        RowSettings.of(Rules([SamplingParams()]), [2**63], [3], CPU)
    with pytest.raises(ValueError, match=r"logits = \[3, 4\] must be \[1, vocabulary\]"):
        choose(torch.zeros(3, 4), RowSettings.of(Rules([SamplingParams()]), [1], [3], CPU))


def test_filters_and_noise_are_skipped_where_no_row_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("not needed here")

    monkeypatch.setattr("helix.choice.kept", refuse)
    sample(random_logits(2, 50), make_batch([SamplingParams(temperature=1.0), SamplingParams(top_k=4)]))
    monkeypatch.setattr("helix.choice.gumbel", refuse)
    sample(random_logits(2, 50), make_batch([SamplingParams(), SamplingParams(top_p=0.5)]))
