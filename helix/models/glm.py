"""GLM-4 (model_type "glm", or "glm4" since 2025): biases on q, k and v, gate and up in one matrix, part of each head
rotated in pairs. What attention and feed-forward of the latter add is normalised.

RoPE turns the first partial_rotary_factor * head_dim elements of a head, each even element with its odd neighbour.
The output projection has no bias even where `attention_bias` is set.
"""

from typing import Any

from .hf_config import spec_from
from .spec import ModelSpec
from .weight_names import WeightNames

NAMES = WeightNames(
    gate="model.layers.{layer}.mlp.gate_up_proj.weight",
    up=None,
    mixed_norm="model.layers.{layer}.post_self_attn_layernorm.weight",
    fed_norm="model.layers.{layer}.post_mlp_layernorm.weight",
)


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers GlmConfig or Glm4Config; ValueError for what Helix does not compute."""
    return spec_from(
        config, config.model_type, turned_share=1.0, qkv_bias=bool(config.attention_bias), interleaved=True,
        names=NAMES, normalises_added=config.model_type == "glm4",
    )  # fmt: skip
