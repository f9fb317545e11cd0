"""Claims about helix.sampling: settings, filters against a slow oracle, draws that depend on their own row only."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from torch import Tensor

from helix import choose_kernels, penalty_kernels
from helix.choice import FILTERED, NOISE, RowSettings, Rules, choose, scores
from helix.filters import kept
from helix.logprobs import SampledTokens, with_logprobs
from helix.mass import mass
from helix.penalty_kernels import count_tokens, penalise
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


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "sampling.max_tokens = 0 must lie in [1, 2**31)"),
        ({"max_tokens": 10**30}, "must lie in [1, 2**31)"),
        ({"temperature": -0.1}, "sampling.temperature = -0.1 must be 0 (greedy) or lie in [0.00001, 100000]"),
        ({"temperature": math.nan}, "sampling.temperature = nan must be 0 (greedy) or lie in [0.00001, 100000]"),
        ({"temperature": 10**400}, "must be 0 (greedy) or lie in [0.00001, 100000]"),
        ({"top_k": -2}, "sampling.top_k = -2 must lie in [0, 2**63) (0 keeps every token)"),
        ({"top_p": 1.5}, "sampling.top_p = 1.5 must lie in (0, 1]"),
        ({"top_p": 0.0}, "sampling.top_p = 0.0 must lie in (0, 1]"),
        ({"min_p": -0.5}, "sampling.min_p = -0.5 must lie in [0, 1]"),
        ({"min_p": 1.01}, "sampling.min_p = 1.01 must lie in [0, 1]"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty = 0.0 must lie in [0.01, 100] (1 is none)"),
        ({"repetition_penalty": math.inf}, "sampling.repetition_penalty = inf must lie in [0.01, 100] (1 is none)"),
        ({"presence_penalty": 2.5}, "sampling.presence_penalty = 2.5 must lie in [-2, 2]"),
        ({"frequency_penalty": -3.0}, "sampling.frequency_penalty = -3.0 must lie in [-2, 2]"),
        ({"seed": -1}, "sampling.seed = -1 must lie in [0, 2**63) or be null"),
        ({"seed": 2**63}, "sampling.seed = 9223372036854775808 must lie in [0, 2**63) or be null"),
        ({"stop": ["END", ""]}, "sampling.stop = ['END', ''] must not contain an empty string"),
        ({"stop_token_ids": [3, -2]}, "sampling.stop_token_ids = [3, -2] must hold token ids in [0, 2**31)"),
        ({"stop_token_ids": [10**30]}, "must hold token ids in [0, 2**31)"),
        ({"stop_token_ids": [1] * 1025}, "must hold at most 1024 ids"),
        ({"stop": ["a"] * 65}, "must hold at most 64 strings"),
        ({"stop": ["a" * 1001]}, "must hold strings of at most 1000 characters"),
        ({"stop": ["a", "\ud800"]}, "sampling.stop[1] is no valid text: character 0, '\\ud800', is a lone surrogate"),
        ({"min_tokens": 17}, "sampling.min_tokens = 17 must be at most sampling.max_tokens = 16"),
        ({"logit_bias": {3: 100.5}}, "sampling.logit_bias = {3: 100.5} must hold values in [-100, 100]"),
        ({"logit_bias": {3: math.nan}}, "sampling.logit_bias = {3: nan} must hold values in [-100, 100]"),
        ({"logit_bias": {-3: 1.0}}, "sampling.logit_bias = {-3: 1.0} must hold token ids in [0, 2**31)"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "must hold at most 1024 token ids"),
        ({"bad_words": ["a", " "]}, "sampling.bad_words = ['a', ' '] must not contain an empty string"),
        ({"logprobs": 10**30}, "must lie in [0, 2**31) or be null (none returned)"),
        ({"logprobs": -1}, "sampling.logprobs = -1 must lie in [0, 2**31) or be null (none returned)"),
    ],
)
def test_invalid_value_is_refused_with_its_name_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**settings)
    assert str(caught.value).endswith(message)
    with pytest.raises(ValueError) as caught:
        SamplingParams().with_overrides(settings)
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_tokens": True}, "sampling.max_tokens = True must be of type int | None"),
        ({"max_tokens": "8"}, "sampling.max_tokens = '8' must be of type int | None"),
        ({"max_tokens": 8.5}, "sampling.max_tokens = 8.5 must be of type int | None"),
        ({"temperature": "0.5"}, "sampling.temperature = '0.5' must be of type float"),
        ({"temperature": False}, "sampling.temperature = False must be of type float"),
        ({"ignore_eos": 1}, "sampling.ignore_eos = 1 must be of type bool"),
        ({"seed": 1.5}, "sampling.seed = 1.5 must be of type int | None"),
        ({"stop": [7]}, "sampling.stop = [7] must be of type list[str]"),
        ({"stop_token_ids": 7}, "sampling.stop_token_ids = 7 must be of type list[int]"),
        ({"logit_bias": {"x": 1.0}}, "sampling.logit_bias = {'x': 1.0} must be of type dict[int, float]"),
        ({"logit_bias": {"3": "1"}}, "sampling.logit_bias = {3: '1'} must be of type dict[int, float]"),
        ({"stop_token_ids": [True]}, "sampling.stop_token_ids = [True] must be of type list[int]"),
    ],
)
def test_override_of_wrong_type_is_refused_without_coercion(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams().with_overrides(overrides)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"max_tokens": 4.0, "seed": 3.0}, {"max_tokens": 4, "seed": 3}),
        ({"max_tokens": np.int64(4), "top_p": np.float32(0.5)}, {"max_tokens": 4, "top_p": 0.5}),
        ({"top_k": -1, "temperature": 1e-6}, {"top_k": 0, "temperature": 0.0}),
        (
            {"logit_bias": {"7": 1.0, 9: -2.5}, "bad_words": "no"},
            {"logit_bias": {7: 1.0, 9: -2.5}, "bad_words": ["no"]},
        ),
        ({"stop": "END", "stop_token_ids": (1, 2)}, {"stop": ["END"], "stop_token_ids": [1, 2]}),
        ({"top_p": None, "stop": None, "logit_bias": None}, {}),
    ],
)
def test_values_that_mean_the_same_are_the_same(given: dict[str, Any], meant: dict[str, Any]) -> None:
    expected = SamplingParams(**meant)
    assert repr(SamplingParams(**given)) == repr(expected) == repr(SamplingParams().with_overrides(given))


def test_one_answer_may_be_asked_for_and_null_leaves_a_setting_as_it_is() -> None:
    base = SamplingParams(top_p=0.5, seed=3)
    assert base.with_overrides({"n": 1, "top_p": None, "seed": None}) == SamplingParams(top_p=0.5)
    with pytest.raises(ValueError, match=r"sampling\.n = 2 must be 1; give the prompt once for each answer"):
        base.with_overrides({"n": 2})


def test_unknown_override_is_refused_with_the_valid_settings() -> None:
    with pytest.raises(
        ValueError, match=r"sampling\.topp is not a setting; valid settings: max_tokens, .*, prompt_logprobs$"
    ):
        SamplingParams().with_overrides({"topp": 0.5})


def test_overrides_replace_only_what_they_name_and_leave_the_original() -> None:
    base = SamplingParams(max_tokens=5, stop=["a"], seed=3)
    changed = base.with_overrides({"temperature": 1, "stop": "END", "seed": None, "logprobs": 2})
    assert changed == SamplingParams(max_tokens=5, temperature=1.0, stop=["END"], seed=None, logprobs=2)
    assert base == SamplingParams(max_tokens=5, stop=["a"], seed=3)


def test_copies_share_no_lists() -> None:
    base = SamplingParams(stop=["a"], stop_token_ids=[1])
    copy = base.with_overrides({})
    copy.stop.append("b")
    copy.stop_token_ids.append(2)
    assert (base.stop, base.stop_token_ids) == (["a"], [1])


def test_params_are_an_omegaconf_structured_config() -> None:
    config = OmegaConf.merge(OmegaConf.structured(SamplingParams), {"temperature": 1, "stop": ["x"], "seed": None})
    assert OmegaConf.to_object(config) == SamplingParams(temperature=1.0, stop=["x"])
    with pytest.raises(ValidationError):
        OmegaConf.merge(config, {"top_k": "many"})
    with pytest.raises(ValueError, match=r"sampling\.top_p = 1\.5 must lie in \(0, 1\]"):
        OmegaConf.to_object(OmegaConf.merge(config, {"top_p": 1.5}))


# --- greedy -----------------------------------------------------------------------------------------------------------


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


# --- filters and penalties --------------------------------------------------------------------------------------------


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


# --- draws ------------------------------------------------------------------------------------------------------------


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


# --- log-probabilities ------------------------------------------------------------------------------------------------


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


# --- what is refused, what is skipped ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_best_score_of_all_slices_is_that_of_the_whole(shards: int) -> None:
    params = [SamplingParams(temperature=row % 3) for row in range(30)]
    logits, settings = random_logits(30, 1001), make_batch(params).settings
    bounds = [1001 * shard // shards for shard in range(shards + 1)]
    parts = [scores(logits[:, a:b], settings, a) for a, b in pairwise(bounds)]
    chosen = choose(logits, settings)
    assert torch.equal(torch.cat(parts, 1).argmax(-1), chosen)
    floats, integers = settings.floats.to(KERNELS_ON), settings.integers.to(KERNELS_ON)
    keys = [
        choose_kernels.best_keys(logits[:, a:b].to(KERNELS_ON), floats, integers, a, 1000) for a, b in pairwise(bounds)
    ]
    assert torch.equal(1000 - (torch.stack(keys).amax(0) & 0xFFFFFFFF).cpu(), chosen)


ON_DEVICES = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.3, "top_p": 0.5, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.2, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.001},
]


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


@pytest.mark.parametrize("kind", ["normal", "tied", "flat", "peaked", "banned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_choose_what_the_rules_say(kind: str, dtype: torch.dtype) -> None:
    for vocabulary in (300, 2500) if KERNELS_ON == "cpu" else (300, 4099, 151_552):
        params = [SamplingParams(**ON_DEVICES[row % len(ON_DEVICES)]) for row in range(18)]
        settings = RowSettings.of(Rules(params), list(range(18)), [vocabulary] * 18, CPU)
        logits = kernel_logits(kind, 18, vocabulary).to(dtype)
        got = chosen_by_kernels(logits, settings, KERNELS_ON)
        assert torch.equal(got, choose(logits, settings))
        alone = RowSettings.of(Rules(params[3:4]), [3], [vocabulary], CPU)
        assert torch.equal(chosen_by_kernels(logits[3:4], alone, KERNELS_ON), got[3:4])


def test_kernels_penalise_and_count_as_pytorch_does() -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 3, (4, 3000), generator=generator, dtype=torch.int32)
    counts[:, ::5] |= IN_PROMPT
    slots, tokens = torch.tensor([2, -1, 0, 0]), torch.tensor([105, 104, 99, 103])
    amounts = torch.tensor([[1.3, 1, 0.7, 0.7], [0.5, 0, 0, 0], [0.1, 0, -0.3, -0.3]], dtype=torch.float64)
    drafts = torch.tensor([[-1, -1], [7, 7], [103, 104], [103, 103]])
    logits = random_logits(4, 3000)
    want = penalise(logits, counts, slots, amounts, drafts, 100)
    on = [each.to(KERNELS_ON) for each in (logits, counts, slots, amounts, drafts)]
    if KERNELS_ON == "cpu":
        out = torch.empty_like(logits)
        given = (logits, out, counts, slots, amounts, drafts)
        penalty_kernels._penalise_kernel[(4, 2)](*given, 3000, 3000, 4, 2, 100, CHUNK=2048)
        penalty_kernels._count_kernel[(4,)](counted := counts.clone(), tokens, slots, 3000, 100)
    else:
        out = penalise(*on, 100).cpu()
        count_tokens(on[1], tokens.to(KERNELS_ON), slots.to(KERNELS_ON), 100)
        counted = on[1].cpu()
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    count_tokens(counts, tokens, slots, 100)
    assert torch.equal(counted, counts)
