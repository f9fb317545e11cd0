"""Qwen3-Next (model_type "qwen3_next"): three state layers to one of gated attention, and experts beside a gated one.

Attention's output is gated, heads are rotated in part, norms exceed one, and the input projections of state layers
stand key head by key head. The layer of the checkpoint that predicts one token further (``mtp.*``) is not read.
"""

from typing import Any

from .hf_config import layer_kinds, require, spec_from
from .spec import Experts, ModelSpec
from .states import States
from .weight_names import WeightNames

SHARED = "model.layers.{layer}.mlp.shared_expert."
NAMES = WeightNames(
    shared_gate=SHARED + "gate_proj.weight",
    shared_up=SHARED + "up_proj.weight",
    shared_down=SHARED + "down_proj.weight",
)


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers Qwen3NextConfig; ValueError for a setting that Helix does not compute."""
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
    layers = range(config.num_hidden_layers)
    experts = experts_of(
        config,
        normalised=bool(config.norm_topk_prob),
        dense_layers=frozenset(layer for layer in layers if layer in dense or (layer + 1) % step),
    )
    return hybrid_spec(config, "qwen3_next", experts=experts if config.num_experts else None, by_key_head=True)


def experts_of(config: Any, *, normalised: bool, dense_layers: frozenset[int] = frozenset()) -> Experts:
    """Return the experts of a config whose shared expert is gated."""
    return Experts(
        num_experts=config.num_experts or 1,
        num_chosen=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        normalised=normalised,
        dense_layers=dense_layers,
        shared_size=config.shared_expert_intermediate_size,
        gates_shared=True,
    )


def hybrid_spec(config: Any, family: str, *, experts: Experts | None, by_key_head: bool) -> ModelSpec:
    """Return the spec of a config of state layers and gated attention; ValueError for what Helix does not compute."""
    require(not config.attention_bias, "attention_bias", True, "Helix has no biases of gated queries; valid: false")
    states = States(
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        taps=config.linear_conv_kernel_dim,
        eps=config.rms_norm_eps,
        by_key_head=by_key_head,
    )
    kinds = layer_kinds(config)
    return spec_from(
        config, family, turned_share=1.0, qk_norm=True, names=NAMES, experts=experts, kinds=kinds,
        states=states if kinds else None, output_gate=True, norms_exceed_one=True,
    )  # fmt: skip
