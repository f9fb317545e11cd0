"""Llama (model_type "llama"): no head norms, whole heads rotated in halves; biases of attention where asked for."""

from typing import Any

from .hf_config import require, require_full_rotation, spec_from
from .spec import ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers LlamaConfig; ValueError for a setting that Helix does not compute.

    `mlp_bias` would put biases on the feed-forward: refused.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    require(not config.mlp_bias, "mlp_bias", True, "Helix has no bias in the feed-forward; valid: false")
    biased = bool(config.attention_bias)
    return require_full_rotation(spec_from(config, "llama", LlamaRotaryEmbedding, qkv_bias=biased, o_bias=biased))
