"""gpt-oss (model_type "gpt_oss"): windows in every second layer, sinks in all, biased experts with clamped gates."""

from typing import Any

from .hf_config import layer_kinds, require, require_full_rotation, spec_from
from .kinds import FULL, WINDOW
from .spec import ClampedGate, Experts, ModelSpec
from .weight_names import WeightNames

NAMES = WeightNames(router="model.layers.{layer}.mlp.router.weight")


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers GptOssConfig; ValueError for a setting that Helix does not compute."""
    require(bool(config.attention_bias), "attention_bias", False, "the family's projections have biases; valid: true")
    how = getattr(config, "quantization_config", None)
    experts = Experts(
        num_experts=config.num_local_experts,
        num_chosen=config.num_experts_per_tok,
        ffn_size=config.intermediate_size,
        normalised=True,  # a softmax over those chosen
        stacked=True,
        in_4_bits=isinstance(how, dict) and how.get("quant_method") == "mxfp4",
        clamped=ClampedGate(
            float(getattr(config, "swiglu_alpha", 1.702)), float(getattr(config, "swiglu_limit", None) or 7.0)
        ),
    )
    spec = spec_from(
        config, "gpt_oss", qkv_bias=True, names=NAMES, experts=experts,
        kinds=layer_kinds(config), o_bias=True, sinks=(FULL, WINDOW),
    )  # fmt: skip
    return require_full_rotation(spec)
