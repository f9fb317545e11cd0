"""Qwen2 and Qwen2.5 (model_type "qwen2"): a Llama with biases on q, k and v."""

from dataclasses import replace
from typing import Any

from .hf_config import layer_kinds, require_full_rotation, spec_from
from .spec import ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers Qwen2Config; ValueError for a setting that Helix does not compute."""
    spec = require_full_rotation(spec_from(config, "qwen2", qkv_bias=True))
    return replace(spec, kinds=layer_kinds(config))
