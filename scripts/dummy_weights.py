"""How the random weights and caches of a benchmark's model are kept: the settings that several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attention.pages import LARGEST, Pages
from helix.config import CACHE_DTYPES, ModelConfig, check_choice
from helix.models.quantization import BLOCK

WEIGHTS = ("bf16", "fp8")  # of matrices
OF_MODELS = (*WEIGHTS, "fp8_head")
LARGEST_BYTE = 0x7E  # 448


@dataclass(kw_only=True, slots=True)
class BenchCache:
    """How keys and values are kept.

    Attributes:
        dtype: as ``cache.dtype`` of a run.
    """

    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_choice("cache.dtype", self.dtype, CACHE_DTYPES)


def fill_pages(pages: Pages) -> None:
    """Fill one layer's pages with random values of about 1 at most, in 8 bits of all sizes."""
    if isinstance(pages, torch.Tensor):
        pages.normal_()
        return
    pages.bytes.random_(0, LARGEST_BYTE + 1)
    pages.scales.fill_(1.0 / LARGEST)
    if pages.turned is not None:
        pages.turned.normal_()


def check_weights(weights: str, model: ModelConfig) -> None:
    """Raise ValueError unless the model can have such weights."""
    check_choice("weights", weights, OF_MODELS)
    if weights != "bf16" and model.config is None:
        raise ValueError(f"weights = {weights} is for a model of random weights (model=glm4_9b_1m); a file has its own")


def check_pairs(name: str, pairs: Sequence[Sequence[int]], of: str) -> None:
    """Raise ValueError unless a setting holds pairs of counts, which ``of`` names, such as [kvp, tpa]."""
    for pair in pairs:
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{name}: {list(pair)} must be {of}, each at least 1")


def with_weights(model: ModelConfig, weights: str) -> ModelConfig:
    """Return the model with its random weights kept so: as the dtype says (bf16), or in blocks of 8 bits (fp8), the
    output head with them (fp8_head).
    """
    if weights == "bf16" or model.config is None:
        return model
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    if weights == "fp8_head":
        settings["modules_to_not_convert"] = []
    return replace(model, config=model.config | {"quantization_config": settings})
