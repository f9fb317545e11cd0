"""Qwen3.5, 3.6 and 3.8 dense and with experts (model_type "qwen3_5" and "qwen3_5_moe"): the text model of their files.

Computed as Qwen3-Next. The input projections of state layers are four matrices, experts may be stacked, and the text
model's config and tensors stand beside those of a vision tower, which is not read; neither is the layer that predicts
one token further (``mtp.*``).
"""

from typing import Any

from .qwen3_next import experts_of, hybrid_spec
from .spec import ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers Qwen3_5TextConfig or Qwen3_5MoeTextConfig.

    Raises ValueError for a setting that Helix does not compute.
    """
    has_experts = config.model_type == "qwen3_5_moe_text"
    return hybrid_spec(
        config,
        "qwen3_5_moe" if has_experts else "qwen3_5",
        experts=experts_of(config, normalised=True) if has_experts else None,
        by_key_head=False,
    )
