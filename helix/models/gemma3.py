"""Gemma 3, its text model (model_type "gemma3_text", or "gemma3" beside a vision tower, which is not read).

Of six layers five see a window, and their RoPE has a base of its own. What attention and feed-forward add is normalised
before it joins the stream, embeddings are multiplied, gates are GELUs, and scores have a scale of the config's.
"""

from typing import Any

from .hf_config import (
    SLIDING_ATTENTION,
    layer_kinds,
    require,
    require_full_rotation,
    rope_of,
    spec_from,
)
from .spec import ModelSpec
from .weight_names import WeightNames

GELU = "gelu_pytorch_tanh"
NAMES = WeightNames(post_norm="model.layers.{layer}.pre_feedforward_layernorm.weight")


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers Gemma3TextConfig; ValueError for a setting that Helix does not compute."""
    name = "hidden_activation"
    require(config.hidden_activation == GELU, name, config.hidden_activation, f"Helix computes {GELU!r} only")
    require(not config.attention_bias, "attention_bias", True, "Helix adds no bias before a norm; valid: false")
    spec = spec_from(
        config, "gemma3", activation=GELU, qk_norm=True, names=NAMES, kinds=layer_kinds(config),
        norms_exceed_one=True, gelu=True, normalises_added=True, embedding_scale=config.hidden_size**0.5,
        score_scale=config.query_pre_attn_scalar**-0.5, window_rope=rope_of(config, kind=SLIDING_ATTENTION),
    )  # fmt: skip
    return require_full_rotation(spec)
