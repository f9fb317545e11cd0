"""Llama (model_type "llama"): no biases, no head norms, whole heads rotated in halves."""

from typing import Any

from .hf_config import require, require_full_rotation, spec_from
from .spec import ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers LlamaConfig; ValueError for a setting that Helix does not compute.

    `attention_bias` would also put a bias on the output projection, and `mlp_bias` on the feed-forward: both refused.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    require(not config.attention_bias, "attention_bias", True, "Helix has no output projection bias; valid: false")
    require(not config.mlp_bias, "mlp_bias", True, "Helix has no bias in the feed-forward; valid: false")
    return require_full_rotation(spec_from(config, "llama", LlamaRotaryEmbedding))
