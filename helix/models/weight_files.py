"""Which files of a folder hold a model's weights, and what a folder that holds none is.

People's folders have more or fewer files than the ideal one. What is certain is read; for anything else one line says
what is there and what to do.
"""

import json
import re
from pathlib import Path
from typing import Any

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What holds weights that Helix does not read: patterns of names, what they are, the way out.
OTHER_KINDS = (
    (("*.gguf",), "GGUF", "python -m scripts.import_gguf FILE output=NEW_DIR makes a folder that Helix reads"),
    (
        ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"),
        "pickle",
        "convert with AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
    ),
    (("*.distcp",), "torch.distributed.checkpoint", "save the model with save_pretrained(NEW_DIR)"),
    (
        ("tf_model*.h5", "flax_model*.msgpack", "*.onnx", "weights*.npz"),
        "another framework's",
        "take the model's safetensors files",
    ),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line and names the file or tensor."""


def open_files(path: Path) -> dict[str, Any]:
    """Return the opened safetensors files of a checkpoint folder by name, as safetensors' readers.

    model.safetensors alone where it is there, as transformers does; else the shards of the index, or all that their
    numbering names where there is no index that could be followed; else the only safetensors file.
    Raises CheckpointError when files are missing or broken, or hold something else.
    """
    return {name: _open(path / name) for name in _names(path)}


def tensor_names(path: Path) -> set[str]:
    """Return the names of all tensors in a checkpoint folder; see ``open_files``."""
    return {name for file in open_files(path).values() for name in list(file.keys())}


def is_lfs_pointer(file: Path) -> bool:
    """Return whether a file is what git leaves of a large one that was not fetched."""
    try:
        with file.open("rb") as content:
            return content.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def what_else(path: Path) -> str | None:
    """Return, as words that follow a path and "holds", what a folder holds instead of safetensors; None for nothing."""
    if (path / ADAPTER_FILE).is_file():
        return "an adapter (LoRA), no whole model; merge it into its base with PEFT's merge_and_unload and save that"
    for patterns, kind, way_out in OTHER_KINDS:
        if found := sorted({file.name for pattern in patterns for file in path.glob(pattern)}):
            return f"only {kind} files ({few(found)}), refused: Helix reads safetensors only; {way_out}"
    inside = sorted({*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")})
    return f"a model in {inside[0].parent.relative_to(path)}; give that folder" if inside else None


def few(names: list[str], limit: int = 3) -> str:
    """Return the first names, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _names(path: Path) -> list[str]:
    if (path / ADAPTER_FILE).is_file():  # even beside whole weights: transformers would add it to them
        raise CheckpointError(f"{path} holds {what_else(path)}; remove {ADAPTER_FILE} to run the weights without it")
    if (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    present = sorted(file.name for file in path.glob("*.safetensors"))
    numbered = _numbered(present)
    whole = [files for total, files in numbered if len(files) == total]
    index = path / INDEX_FILE
    if index.is_file():
        return _indexed(index, present, whole)
    if len(whole) == 1:
        return whole[0]
    if numbered:
        total, files = numbered[0]
        state = f"lacks {total - len(files)} of {total} files" if len(numbered) == 1 else "mixes several sets of files"
        raise CheckpointError(f"{path} {state}, of which {few(files)} are there; fetch the checkpoint again")
    if len(present) == 1:
        return present
    if present:
        raise CheckpointError(f"{path} holds {few(present)} but no {INDEX_FILE} that makes them one model")
    if other := what_else(path):
        raise CheckpointError(f"{path} holds {other}")
    raise CheckpointError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _indexed(index: Path, present: list[str], whole: list[list[str]]) -> list[str]:
    """Return the index's files; all of their numbering where it leaves some out, names others or cannot be read."""
    try:
        names = sorted(set(_read_weight_map(index).values()))
    except CheckpointError:
        if len(whole) == 1:
            return whole[0]
        raise
    missing = [name for name in names if name not in present]
    for files in whole:
        if set(names) - set(missing) <= set(files) and (not missing or len(whole) == 1):
            return files
    if missing:
        count = f"{len(missing)} of {len(names)} files"
        raise CheckpointError(f"{index.parent} lacks {count} that {INDEX_FILE} names: {few(missing)}")
    return names


def _numbered(present: list[str]) -> list[tuple[int, list[str]]]:
    """Return the sets of shards by their numbering: how many a set has, and those that are there."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in present:
        if match := SHARD.fullmatch(name):
            sets.setdefault((match[1], int(match[3])), []).append(name)
    return [(total, files) for (_, total), files in sets.items()]


def _open(file: Path) -> Any:
    if is_lfs_pointer(file):
        raise CheckpointError(f"{file} is a git-lfs pointer, not the file itself; run git lfs pull in its folder")
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({reason})") from error


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f'{index} is not an index of shards: a JSON object with a "weight_map"') from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f'{index} is not an index of shards: "weight_map" must map tensor names to file names')
    return weight_map
