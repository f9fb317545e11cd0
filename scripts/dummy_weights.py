"""How the random weights of a benchmark's model are kept: the setting that several benchmarks share."""

from __future__ import annotations

from dataclasses import replace

from helix.config import ModelConfig, check_choice
from helix.models.quantization import BLOCK

WEIGHTS = ("bf16", "fp8")


def check_weights(weights: str, model: ModelConfig) -> None:
    """Raise ValueError unless the model can have such weights."""
    check_choice("weights", weights, WEIGHTS)
    if weights != "bf16" and model.config is None:
        raise ValueError(f"weights = {weights} is for a model of random weights (model=glm4_9b_1m); a file has its own")


def with_weights(model: ModelConfig, weights: str) -> ModelConfig:
    """Return the model with its random weights kept so: as the dtype says (bf16), or in blocks of 8 bits (fp8)."""
    if weights == "bf16" or model.config is None:
        return model
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    return replace(model, config=model.config | {"quantization_config": settings})
