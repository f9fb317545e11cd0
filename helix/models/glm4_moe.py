"""GLM-4.5 and later with experts (model_type "glm4_moe"): part of each head rotated in halves, biases on q, k and v.

Experts are those of DeepSeek-V3. The output projection has no bias even where `attention_bias` is set. Queries and keys
are normalised in the larger models alone (`use_qk_norm`).
"""

from typing import Any

from .hf_config import spec_from
from .spec import Experts, ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers Glm4MoeConfig; ValueError for a setting that Helix does not compute."""
    experts = Experts(
        num_experts=config.n_routed_experts,
        num_chosen=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        normalised=bool(config.norm_topk_prob),
        dense_layers=frozenset(range(config.first_k_dense_replace)),
        sigmoid=True,
        groups=config.n_group or 1,
        groups_chosen=config.topk_group or 1,
        scale=float(config.routed_scaling_factor),
        shared_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
    )
    return spec_from(
        config, "glm4_moe", turned_share=1.0, qkv_bias=bool(config.attention_bias),
        qk_norm=bool(config.use_qk_norm), experts=experts,
    )  # fmt: skip
