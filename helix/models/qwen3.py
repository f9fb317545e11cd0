"""Qwen3 dense models (model_type "qwen3"): RMSNorm over each head of q and k before RoPE."""

from dataclasses import replace
from typing import Any

from .hf_config import layer_kinds, require_full_rotation, spec_from
from .spec import ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers Qwen3Config; ValueError for a setting that Helix does not compute."""
    biased = bool(config.attention_bias)
    spec = spec_from(config, "qwen3", qkv_bias=biased, qk_norm=True, o_bias=biased)
    return replace(require_full_rotation(spec), kinds=layer_kinds(config))
