"""What settings become for a model with state layers, which go on from the last state or from a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..config import HelixConfig
from ..models.kinds import STATE
from ..models.spec import ModelSpec

_log = logging.getLogger(__name__)


def with_states(config: HelixConfig, spec: ModelSpec) -> HelixConfig:
    """Return the settings, with reuse of parts of blocks off where a model has state layers, which is said.

    Raises:
        ValueError: in one line, for settings that need states of earlier tokens, or states elsewhere.
    """
    every = config.cache.checkpoint_every
    if every is not None and not spec.kinds:
        raise ValueError(
            f"cache.checkpoint_every = {every} is for models with state layers or windows, and this {spec.family} has "
            "neither; leave it out"
        )
    if not spec.layers_of(STATE):
        return config
    if not spec.num_cached_layers:
        raise ValueError(f"config layer_types names no layer of {spec.family} full_attention; Helix needs one at least")
    if config.cache.reuse:
        _log.info("cache.partial_reuse: off, the state layers of %s go on from checkpoints only", spec.family)
    return replace(config, cache=replace(config.cache, partial_reuse=False))
