"""The files that say what a model is: config.json, and what stands beside it in a folder."""

import json
from pathlib import Path
from typing import Any

from ..checks import one_line
from .weight_files import OTHER_KINDS, is_lfs_pointer, what_else

MODELOPT_FILE = "hf_quant_config.json"


def find_config(path: str | Path) -> Path:
    """Return the config.json that `path`, a folder or the file itself, stands for; ValueError if there is none."""
    path = Path(path).expanduser()
    if not path.exists():
        problem = f"model.path = {path} does not exist; give a checkpoint folder or a config.json file"
        if len(path.parts) == 2 and not path.is_absolute():
            problem += f"; names of a hub are not fetched: hf download {path} --local-dir DIR"
        raise ValueError(problem)
    if path.is_dir():
        if (path / "config.json").is_file():
            return path / "config.json"
        if other := what_else(path):
            raise ValueError(f"model.path = {path} holds {other}")
        raise ValueError(f"model.path = {path} has no config.json; give a checkpoint folder or a config.json file")
    if path.suffix != ".json":
        what = "a GGUF file; " + OTHER_KINDS[0][2] if path.suffix == ".gguf" else "a file; give its folder"
        raise ValueError(f"model.path = {path} is {what}")
    return path


def read_config_file(file: Path, path: str | Path) -> dict[str, Any]:
    """Return what a config.json holds, and how weights are quantised, which modelopt says in a file of its own.

    Arguments and errors as of ``read_json``.
    """
    raw, beside = read_json(file, path), file.parent / MODELOPT_FILE
    if raw.get("quantization_config") or not beside.is_file():
        return raw
    return raw | {"quantization_config": read_json(beside, path) | {"quant_method": "modelopt"}}


def read_json(file: Path, path: str | Path) -> dict[str, Any]:
    """Return the JSON object in `file`, part of model.path `path`; ValueError names the line that is broken."""
    if is_lfs_pointer(file):
        raise ValueError(f"model.path = {path}: {file.name} is a git-lfs pointer; run git lfs pull in its folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"model.path = {path}: {file.name} is not valid JSON: line {error.lineno}, {error.msg}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.path = {path}: {file.name} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model.path = {path}: {file.name} holds {type(content).__name__}, must be a JSON object")
    return content
