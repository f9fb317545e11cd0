"""A run that asks for it samples as the checkpoint's generation_config.json says, but for what it sets itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from helix.config import HelixConfig, ModelConfig, SamplingConfig
from helix.models.generation_config import with_models_sampling
from helix.sampling import SamplingParams

FILE = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [1, 2], "max_length": 20}


def resolved(folder: Path, file: Any, **sampling: Any) -> SamplingParams:
    if file is not None:
        (folder / "generation_config.json").write_text(file if isinstance(file, str) else json.dumps(file))
    config = HelixConfig(model=ModelConfig(path=str(folder)), sampling=SamplingConfig(**sampling))
    once = with_models_sampling(config)
    assert with_models_sampling(once) == once
    return once.sampling


def test_what_is_left_at_its_default_is_the_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    params = resolved(tmp_path, FILE, defaults="model", top_p=0.5, max_tokens=7)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.5, 20, 7)
    assert caplog.messages == ["sampling.defaults=model: temperature=0.6, top_k=20 from generation_config.json"]
    request = params.with_overrides({"temperature": 0})
    assert (request.temperature, request.top_k) == (0, 20) and type(request) is SamplingParams


@pytest.mark.parametrize(
    ("file", "temperature"),
    [
        (None, 0),
        ({"temperature": 0.6, "do_sample": False}, 0),
        ({"temperature": 0.6}, 0.6),
        ({"do_sample": True}, 1),
        ({"temperature": None, "top_k": 5}, 0),
    ],
)
def test_files_that_say_less(tmp_path: Path, file: Any, temperature: float) -> None:
    assert resolved(tmp_path, file, defaults="model").temperature == temperature


def test_it_is_not_read_unless_asked_for(tmp_path: Path) -> None:
    assert resolved(tmp_path, "no JSON") == SamplingConfig()


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ({"temperature": -1}, "generation_config.json: sampling.temperature = -1 must be 0 (greedy) or lie in"),
        ({"top_k": "many"}, "generation_config.json: sampling.top_k = 'many' must be of type int"),
        ("no JSON", "generation_config.json"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, file: Any, problem: str) -> None:
    with pytest.raises(ValueError) as refused:
        resolved(tmp_path, file, defaults="model")
    assert problem in str(refused.value) and "\n" not in str(refused.value)


def test_a_request_has_no_defaults_to_name() -> None:
    with pytest.raises(ValueError, match="sampling.defaults is not a setting"):
        SamplingConfig().with_overrides({"defaults": "model"})
    with pytest.raises(ValueError, match="sampling.defaults = 'ours' must be one of none, model"):
        SamplingConfig(defaults="ours")
