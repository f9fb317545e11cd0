"""The checkpoint that these tests share, an LLM of it, and transformers' own model as the oracle."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helix import LLM
from scripts.make_checkpoint import make_checkpoint
from tests.helix.llm.small import assert_idle, make_llm


@pytest.fixture(scope="package")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="package")
def shared(path: Path) -> LLM:
    return make_llm(path)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The shared LLM, which every test has to leave without work and with all its pages free."""
    yield shared
    assert_idle(shared)


@pytest.fixture
def edited(path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Give a copy of the checkpoint where a JSON file has other values, or is gone (None)."""

    def copy(**changes: dict[str, Any] | None) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(path, folder)
        for name, change in changes.items():
            file = next(folder.glob(f"{name}.*"))
            if change is None:
                file.unlink()
            else:
                file.write_text(json.dumps(json.loads(file.read_text()) | change))
        return folder

    return copy


@pytest.fixture(scope="package")
def reference(path: Path) -> Callable[[Sequence[int]], torch.Tensor]:
    """The log-probabilities [S, V] of transformers' model after each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @torch.inference_mode()
    def logprobs(token_ids: Sequence[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    return logprobs
