"""Settings of a request: what is refused, what means the same, how they are replaced."""

import math
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from helix.sampling import SamplingParams


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
