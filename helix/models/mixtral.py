"""Mixtral (model_type "mixtral"): a Mistral whose feed-forward is a mixture of experts in every layer."""

from dataclasses import replace
from typing import Any

from .hf_config import layer_kinds, require_full_rotation, spec_from
from .spec import Experts, ModelSpec
from .weight_names import WeightNames

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
NAMES = WeightNames(
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    expert_gate=_EXPERT + "w1.weight",
    expert_up=_EXPERT + "w3.weight",
    expert_down=_EXPERT + "w2.weight",
)


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers MixtralConfig; ValueError for a setting that Helix does not compute."""
    experts = Experts(
        num_experts=config.num_local_experts,
        num_chosen=config.num_experts_per_tok,
        ffn_size=config.intermediate_size,
        normalised=True,
    )
    spec = spec_from(config, "mixtral", names=NAMES, experts=experts)
    return replace(require_full_rotation(spec), kinds=layer_kinds(config))
