"""From a checkpoint's config.json to its `ModelSpec`.

Each family has its own small module that turns its config into a spec; the table below names them, and a family is
imported only when a model asks for it.
"""

import importlib
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..checks import one_line
from .config_files import find_config, read_config_file, read_json
from .config_keys import check_keys
from .hf_config import as_token_ids, read_config
from .kinds import FULL_KIND
from .quantization import read_quantization
from .spec import ModelSpec

_log = logging.getLogger(__name__)

FAMILIES = {
    "deepseek_v2": ".deepseek",
    "deepseek_v3": ".deepseek",
    "gemma3": ".gemma3",
    "glm": ".glm",
    "glm4": ".glm",
    "glm4_moe": ".glm4_moe",
    "gpt_oss": ".gpt_oss",
    "kimi_k2": ".deepseek",
    "llama": ".llama",
    "mimo_v2_flash": ".mimo_v2_flash",
    "mistral": ".mistral",
    "mixtral": ".mixtral",
    "qwen2": ".qwen2",
    "qwen3": ".qwen3",
    "qwen3_5": ".qwen3_5",
    "qwen3_5_moe": ".qwen3_5",
    "qwen3_moe": ".qwen3_moe",
    "qwen3_next": ".qwen3_next",
    "seed_oss": ".llama",
}
SAME_AS = {"kimi_k2": "deepseek_v3"}  # model types that are another one under a name that transformers does not know
# families whose config.json has the text model's config in "text_config", and what model_type that has
TEXT_PARTS = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


def load_spec(path: str | Path, *, max_position: int | None = None) -> ModelSpec:
    """Read the spec of the model at `path`, a checkpoint folder or a config.json file, from local files only.

    max_position (tokens) replaces the config's own context limit; the RoPE frequencies stay as the config says.
    Raises ValueError, in one line, when the file is missing or broken, the family is unknown, or the config asks for
    something that the runtime does not compute (sparse attention, another activation, capped scores, ...).
    """
    config_file = find_config(path)
    generation = config_file.parent / "generation_config.json"
    spec = spec_of(read_config_file(config_file, path), f"model.path = {path}", max_position=max_position)
    settings = read_json(generation, path) if generation.is_file() else {}
    try:
        eos = as_token_ids(settings.get("eos_token_id"))
    except ValueError as error:
        raise ValueError(f"model.path = {path}: {generation.name}: {error}") from error
    return replace(spec, eos_token_ids=eos or spec.eos_token_ids)


def spec_of(raw: dict[str, Any], source: str, *, max_position: int | None = None) -> ModelSpec:
    """Return the spec of the config.json whose content is `raw`; see `load_spec`. Errors begin with `source`."""
    raw = _text_part(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{source} has model_type {model_type!r}; supported: {', '.join(sorted(FAMILIES))}")
    model_type = SAME_AS.get(model_type, model_type)
    raw = raw | {"model_type": model_type}
    family = importlib.import_module(FAMILIES[model_type], __package__)
    try:
        config = read_config(raw | {"model_type": TEXT_PARTS.get(model_type, model_type)})
        check_keys(raw, config, model_type, max_position or config.max_position_embeddings)
        spec: ModelSpec = replace(family.make_spec(config), quantization=read_quantization(raw))
        if max_position is not None and max_position > spec.max_position and _log.isEnabledFor(logging.INFO):
            _say_beyond(max_position, spec.max_position, source)
        spec = spec if max_position is None else replace(spec, max_position=max_position)
        kinds = tuple(FULL_KIND if kind.window >= spec.max_position else kind for kind in spec.kinds)
        return replace(spec, kinds=kinds if any(kind.is_bounded for kind in kinds) else ())
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{source}: {one_line(error)}") from error


@cache
def _say_beyond(asked: int, own: int, source: str) -> None:
    """Say that positions are asked for which the model does not know: once, however often a run reads its spec."""
    _log.info(
        "model.max_position = %d exceeds the %d tokens that %s names, and RoPE stays as it says: what comes beyond "
        "may make no sense", asked, own, source,
    )  # fmt: skip


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the text model alone, its model_type the family's, where there are others beside it."""
    family = {part: family for family, part in TEXT_PARTS.items()}.get(str(raw.get("model_type")))
    if family is not None:
        return raw | {"model_type": family}
    text = raw.get("text_config")
    if str(raw.get("model_type")) not in TEXT_PARTS or not isinstance(text, dict):
        return raw
    shared = {key: raw[key] for key in ("quantization_config", "tie_word_embeddings", "eos_token_id") if key in raw}
    return shared | text | {"model_type": raw["model_type"]}
