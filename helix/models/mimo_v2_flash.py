"""MiMo-V2-Flash (model_type "mimo_v2_flash"): five layers of six have a window, sinks, RoPE and KV heads of their own.

Values have fewer elements than keys, a part of each head is rotated, and experts are those of DeepSeek-V3 without
shared ones. Keys of the authors' config that transformers does not read must agree with what it takes for granted.
"""

from typing import Any

from .hf_config import FULL_ATTENTION, SLIDING_ATTENTION, layer_kinds, require, rope_of, spec_from
from .kinds import WINDOW
from .spec import Experts, ModelSpec
from .weight_names import WeightNames

SHARE = 0.334  # of a head's elements that turn, where the config does not say
NAMES = WeightNames(sinks="model.layers.{layer}.self_attn.attention_sink_bias")


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers MiMoV2FlashConfig; ValueError for a setting that Helix does not compute."""
    _check_what_is_taken_for_granted(config)
    size, values = config.head_dim, config.v_head_dim
    require(values <= size, "v_head_dim", values, f"values have as many elements as keys at most, head_dim = {size}")
    experts = Experts(
        num_experts=config.n_routed_experts,
        num_chosen=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        normalised=bool(config.norm_topk_prob),
        dense_layers=frozenset(layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "dense"),
        sigmoid=True,
        groups=config.n_group or 1,
        groups_chosen=config.topk_group or 1,
        scale=float(config.routed_scaling_factor),
    )
    scale = config.attention_value_scale
    return spec_from(
        config, "mimo_v2_flash", turned_share=SHARE, qkv_bias=bool(config.attention_bias), names=NAMES, experts=experts,
        kinds=layer_kinds(config), sinks=(WINDOW,), window_rope=rope_of(config, SHARE, kind=SLIDING_ATTENTION),
        window_kv_heads=2 * config.num_key_value_heads, narrow_values=values,
        value_scale=1.0 if scale is None else float(scale),
    )  # fmt: skip


def _check_what_is_taken_for_granted(config: Any) -> None:
    """Raise ValueError where the authors' own keys ask for anything else than transformers computes."""
    ropes, kinds = config.rope_parameters, (FULL_ATTENTION, SLIDING_ATTENTION)
    require(all(kind in ropes for kind in kinds), "rope_parameters", ropes, f"valid: of {kinds[0]} and {kinds[1]}")
    full, near = (ropes[kind] for kind in kinds)
    granted = {
        "hybrid_layer_pattern": [int(kind == SLIDING_ATTENTION) for kind in config.layer_types],
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_num_key_value_heads": 2 * config.num_key_value_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "layernorm_epsilon": config.rms_norm_eps,
        "rope_theta": full["rope_theta"],
        "swa_rope_theta": near["rope_theta"],
        "partial_rotary_factor": full.get("partial_rotary_factor"),
        "n_shared_experts": 0,
    }
    for name, value in granted.items():
        said = getattr(config, name, None)
        require(said is None or said == value, name, said, f"Helix computes {value!r} beside the config's other keys")
