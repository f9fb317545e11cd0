"""What a checkpoint's authors sample it with: generation_config.json, as the defaults of a run that asks for them."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from parallel.launch import from_rank0

from ..config import SAMPLING_DEFAULTS, HelixConfig, SamplingConfig
from ..sampling import SamplingParams
from .config_files import read_json

_log = logging.getLogger(__name__)
C = TypeVar("C", bound=HelixConfig)
NAME = "generation_config.json"
TAKEN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def with_models_sampling(config: C) -> C:
    """Return the settings with the model's own sampling where they ask for it, in place of what is left at its default.

    Collective over the world: rank 0's file counts. Calling it again changes nothing.

    Raises:
        ValueError: on every rank, in one line, for a file that is none, or values that no request could have.
    """
    sampling, (none, model) = config.sampling, SAMPLING_DEFAULTS
    if not isinstance(sampling, SamplingConfig) or sampling.defaults != model:
        return config
    left = {each.name for each in fields(SamplingParams) if getattr(sampling, each.name) == each.default}
    found = from_rank0(lambda: model_sampling(config.model.path))
    taken = {name: value for name, value in found.items() if name in left}
    said = ", ".join(f"{name}={value:g}" for name, value in taken.items()) or "nothing"
    _log.info("sampling.defaults=model: %s from %s", said, NAME)
    return replace(config, sampling=replace(sampling, defaults=none, **taken))


def model_sampling(path: str | Path) -> dict[str, Any]:
    """Return the settings of sampling that the model at a path names; none where it has no such file, or is greedy."""
    folder = Path(path).expanduser() if path else None
    file = None if folder is None else (folder if folder.is_dir() else folder.parent) / NAME
    if file is None or not file.is_file():
        return {}
    settings = read_json(file, str(path))
    if settings.get("do_sample") is False:
        return {}
    given = {name: settings[name] for name in TAKEN if settings.get(name) is not None}
    if settings.get("do_sample"):
        given = {"temperature": 1.0} | given  # as transformers has it
    try:
        SamplingParams().with_overrides(given)
    except ValueError as error:
        raise ValueError(f"model.path = {path}: {NAME}: {error}") from error
    return given
