"""Qwen3 models with experts (model_type "qwen3_moe"): Qwen3 whose feed-forward is a mixture in all or most layers."""

from typing import Any

from .hf_config import require_full_rotation, spec_from
from .spec import Experts, ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers Qwen3MoeConfig; ValueError for a setting that Helix does not compute."""
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
    experts = Experts(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        normalised=bool(config.norm_topk_prob),
        dense_layers=frozenset(
            layer for layer in range(config.num_hidden_layers) if layer in dense or (layer + 1) % step
        ),
    )
    biased = bool(config.attention_bias)
    spec = spec_from(config, "qwen3_moe", qkv_bias=biased, qk_norm=True, experts=experts, o_bias=biased)
    return require_full_rotation(spec)
