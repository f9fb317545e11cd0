"""Qwen3 dense models (model_type "qwen3"): no biases, RMSNorm over each head of q and k before RoPE."""

from dataclasses import replace
from typing import Any

from .hf_config import layer_kinds, require, require_full_rotation, spec_from
from .spec import ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers Qwen3Config; ValueError for a setting that Helix does not compute.

    `attention_bias` would also put a bias on the output projection: refused.
    """
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    require(not config.attention_bias, "attention_bias", True, "Helix has no output projection bias; valid: false")
    spec = require_full_rotation(spec_from(config, "qwen3", Qwen3RotaryEmbedding, qk_norm=True))
    return replace(spec, kinds=layer_kinds(config))
