"""Llama (model_type "llama"): no head norms, whole heads rotated in halves; biases of attention where asked for.

Seed-OSS (model_type "seed_oss") is one that says of the output projection's bias on its own whether it is there.
"""

from typing import Any

from .hf_config import require, require_full_rotation, spec_from
from .spec import ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers LlamaConfig or SeedOssConfig; ValueError for what Helix does not compute.

    `mlp_bias` would put biases on the feed-forward: refused.
    """
    require(not config.mlp_bias, "mlp_bias", True, "Helix has no bias in the feed-forward; valid: false")
    biased = bool(config.attention_bias)
    o_bias = bool(getattr(config, "attention_out_bias", biased))
    spec = spec_from(config, config.model_type, qkv_bias=biased, o_bias=o_bias)
    return require_full_rotation(spec)
