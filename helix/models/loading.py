"""From a model's settings to a filled decoder: its spec, its weights, and random ones where it has none."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from ..config import ModelConfig
from ..stages import through
from .checkpoint import Checkpoint, fill_dummy
from .decoder import Decoder
from .families import load_spec, spec_of
from .spec import ModelSpec
from .tensor_names import named_as_stored
from .weight_files import CheckpointError, tensor_names
from .weights import layer_weights, model_weights, next_weights, tensor_shapes


def read_spec(config: ModelConfig) -> ModelSpec:
    """Return the spec of the model that the settings name, its tensors named as in the checkpoint's files.

    Raises:
        ValueError: in one line that begins with the setting, when there is no such model or it is not supported.
    """
    if config.config is not None:
        return spec_of(config.config, "model.config", max_position=config.max_position)
    if not config.path:
        raise ValueError("model.path is empty: give a Hugging Face checkpoint folder")
    spec = load_spec(config.path, max_position=config.max_position)
    if config.load == "dummy":
        return spec
    try:
        return named_as_stored(spec, tensor_names(Path(config.path).expanduser()))
    except CheckpointError as error:
        raise _named(config, error) from error


def open_checkpoint(config: ModelConfig, spec: ModelSpec) -> Checkpoint | None:
    """Return the checkpoint to read, checked against the spec; None where weights are random.

    Raises:
        ValueError: in one line that begins with the setting.
    """
    if config.load != "checkpoint":
        return None
    try:
        return Checkpoint(Path(config.path), spec)
    except CheckpointError as error:
        raise _named(config, error) from error


def _named(config: ModelConfig, error: CheckpointError) -> ValueError:
    path = str(Path(config.path).expanduser())  # what most of these messages begin with
    return ValueError(f"model.path = {error}" if str(error).startswith(path) else f"model.path = {path}: {error}")


def fill(decoder: Decoder, checkpoint: Checkpoint | None) -> None:
    """Read this rank's weights, and close the checkpoint; or make them, the same ones where ranks hold copies."""
    spec = decoder.spec
    groups = [(model_weights(spec, decoder.part), decoder.top)]
    for layer, parameters in enumerate(decoder.layers):
        groups.append((layer_weights(spec, layer, decoder.part), parameters))
    if spec.predicts_next and decoder.next is not None:
        groups.append((next_weights(spec, decoder.part), decoder.next))
    generator, shapes = torch.Generator(decoder.device), tensor_shapes(spec)
    stage = "making random weights" if checkpoint is None else "reading weights, layer by layer"
    for weights, parameters in through(groups, stage):
        for role, weight in weights.items():
            if checkpoint is not None:
                checkpoint.read(weight, parameters[role])
            else:
                # a seed for each cut of each weight: ranks that hold copies of one make equal ones
                generator.manual_seed(zlib.crc32(repr(weight).encode()))
                fill_dummy(role, shapes[weight.pieces[0].name][-1], parameters[role], generator)
    if checkpoint is not None:
        if spec.latent is None and spec.caches_in_8_bits:
            for layer, parameters in enumerate(decoder.layers):
                scales = checkpoint.cache_scales(layer)
                if scales is not None:
                    parameters["cache_scales"] = scales.to(decoder.device)
        checkpoint.close()
