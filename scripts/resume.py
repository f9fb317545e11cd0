"""What an interrupted run has done already: the lines of its output file that answer what is asked now.

Every line carries a hash of its prompt, its settings and the model. ``resume=true`` takes a line for done only where id
and hash are those of a request; a file with any other line is refused, so results of two runs are never mixed.
The layout, the cache and speculation are not in the hash: they change no token but by rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helix.config import HelixConfig
from helix.models.loading import read_spec
from helix.request import Request

_SAMPLES, _SAMPLE_BYTES = 8, 4096  # of each file of weights, which is too large to read for a hash
_NOT_ASKED = (
    "id",
    "error",
    "sampling",
    "cache_salt",
    "retention",
    "priority",
)  # fields of a request that change no result


def hash_of_model(config: HelixConfig) -> str:
    """Return a hash of what the model computes: its shape, its dtype, its tokenizer and samples of its weights.

    The folder's name is not in it. Reads files, so it is rank 0's alone.

    Raises:
        ValueError: for a config.json that cannot be used.
    """
    digest = hashlib.sha256(repr((read_spec(config.model), config.model.dtype, config.model.load)).encode())
    folder = Path(config.model.path)
    for file in sorted(folder.iterdir()) if config.model.path and folder.is_dir() else []:
        if file.suffix == ".safetensors":
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as weights:
                for sample in range(_SAMPLES):
                    weights.seek(size * (2 * sample + 1) // (2 * _SAMPLES))
                    digest.update(weights.read(_SAMPLE_BYTES))
        elif file.suffix in (".json", ".jinja", ".model", ".txt") and file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def hashes_of(requests: Sequence[Request], config: HelixConfig) -> list[str]:
    """Return the hash of each request, 16 hexadecimal digits: of its prompt, its settings and the model."""
    model = hash_of_model(config)
    return [_hash(request, config, model) for request in requests]


def _hash(request: Request, config: HelixConfig, model: str) -> str:
    asked = {key: value for key, value in asdict(request).items() if key not in _NOT_ASKED and value is not None}
    asked |= {"sampling": asdict(request.sampling or config.sampling.with_overrides({})), "model": model}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def done_lines(path: str, names: Sequence[str], hashes: Sequence[str], *, resume: bool) -> dict[int, str]:
    """Return the lines of an output file that are done, by the index of their request.

    Lines of failed requests are not: they are asked again. A last line that was cut is dropped. Without ``resume``
    nothing is done, and a file may be written over unless it holds what this run began.

    Raises:
        ValueError: with ``resume`` for a line that this run would not have written, without it for a file that holds
            some but not all of this run's lines.
    """
    indices = {name: index for index, name in enumerate(names)}
    done: dict[int, str] = {}
    for number, line, item in _lines(path):
        index = indices.get(item["id"]) if isinstance(item, dict) and isinstance(item.get("id"), str) else None
        if index is None or ("error" not in item and item.get("hash") != hashes[index]):
            if not resume:
                continue
            what = "no line of an output" if index is None else "of another prompt, other settings or another model"
            name = f"of id {json.dumps(item['id'])} " if index is not None else ""
            if index is None and isinstance(item, dict) and "id" in item:
                what = f"of id {json.dumps(item['id'])}, which no prompt has"
            raise ValueError(
                f"resume = true, but output = {path}, line {number}, is {name}{what}; name another output, or remove it"
            )
        if "error" not in item:
            done[index] = line
    if not resume and 0 < len(done) < len(names):
        raise ValueError(
            f"output = {path} holds {len(done)} of this run's {len(names)} lines; resume=true goes on with the others, "
            "or remove the file"
        )
    return done if resume else {}


def _lines(path: str) -> Iterator[tuple[int, str, Any]]:
    """Yield the number, the text and the content of each line of a file; None for a line that is no JSON."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"output = {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield number, line.decode(), json.loads(line)
        except ValueError:
            if number < len(lines):  # the last was cut when its run ended
                yield number, "", None
