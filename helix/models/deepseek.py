"""DeepSeek models (model_type "deepseek_v2" and "deepseek_v3"): latent attention, and experts beside shared ones."""

import math
from typing import Any

from .hf_config import require, spec_from
from .spec import Experts, Latent, ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers DeepseekV2Config or DeepseekV3Config.

    Raises ValueError for a setting that Helix does not compute.
    """
    third = config.model_type == "deepseek_v3"
    require(not config.attention_bias, "attention_bias", True, "Helix has no biases of latents; valid: false")
    require(not getattr(config, "mlp_bias", False), "mlp_bias", True, "Helix has no biases there; valid: false")
    groups, groups_chosen = config.n_group or 1, config.topk_group or 1
    if not third and config.topk_method != "group_limited_greedy":
        groups, groups_chosen = 1, 1
    experts = Experts(
        num_experts=config.n_routed_experts,
        num_chosen=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        normalised=third and bool(config.norm_topk_prob),  # the second generation's router never does
        dense_layers=frozenset(range(config.first_k_dense_replace)),
        sigmoid=third,
        groups=groups,
        groups_chosen=groups_chosen,
        scale=float(config.routed_scaling_factor),
        shared_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
    )
    latent = Latent(
        rank=config.kv_lora_rank,
        turned_dim=config.qk_rope_head_dim,
        plain_dim=config.qk_nope_head_dim,
        value_dim=config.v_head_dim,
        q_rank=config.q_lora_rank,
        scale=(config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5 * _temperature(config),
    )
    interleaved = config.rope_interleave if third else True
    return spec_from(config, config.model_type, interleaved=interleaved, experts=experts, latent=latent)


def _temperature(config: Any) -> float:
    """Return what YaRN multiplies scores by (arXiv 2309.00071) beyond what it does to cos and sin."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default" or not rope.get("mscale_all_dim") or rope["factor"] <= 1:
        return 1.0
    return float(0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
