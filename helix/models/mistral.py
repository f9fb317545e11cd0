"""Mistral (model_type "mistral"): a Llama whose layers may all see a window."""

from dataclasses import replace
from typing import Any

from .hf_config import layer_kinds, require_full_rotation, spec_from
from .spec import ModelSpec


def make_spec(config: Any) -> ModelSpec:
    """Return the spec of a transformers MistralConfig; ValueError for a setting that Helix does not compute."""
    spec = require_full_rotation(spec_from(config, "mistral"))
    return replace(spec, kinds=layer_kinds(config))
