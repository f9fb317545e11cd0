"""Write the block-FP8 checkpoint of a 16- or 32-bit one, in the format of DeepSeek-V3's and Qwen3's files.

    python -m scripts.quantize model.path=DIR output=NEW_DIR

The matrices of the layers' linear modules become e4m3 with one float32 scale for each block of 128 x 128; experts that
stand in stacks become matrices of their own. Embeddings, norms, biases and routers stay as they are, and so do what
Helix does not read (a vision tower) and the output head, but for ``head=true``; experts of gpt-oss, which no file of
this format holds, too. One file of the checkpoint is in memory at a time. It ends with the error of each role: how far
values are from the original, as a root mean square of the original's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save_file

from helix.models.checkpoint import Checkpoint
from helix.models.config_files import find_config
from helix.models.families import load_spec
from helix.models.quantization import BLOCK, Quantization
from helix.models.quantized import quantize_blocks, widen_blocks
from helix.models.spec import ModelSpec
from helix.models.tensor_names import PREDICTS_NEXT, named_as_stored
from helix.models.weight_files import INDEX_FILE, open_files, tensor_names
from helix.models.weights import tensor_shapes
from scripts import cli
from scripts.timing import show

EXPERT = "{expert}"  # in names, for its number


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Which model to quantise.

    Attributes:
        path: a Hugging Face checkpoint folder whose weights have 16 or 32 bits.
    """

    path: str = ""


@dataclass(kw_only=True, slots=True)
class QuantizeConfig:
    """What to quantise.

    Attributes:
        output: the folder to write, which must be empty or not there yet.
        head: quantise the output head as well, where it is a matrix of its own.
    """

    model: SourceConfig = field(default_factory=SourceConfig)
    output: str = ""
    head: bool = False

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty: give the folder to write")


@dataclass
class Errors:
    """What one role lost: matrices and elements so far, and sums over the elements.

    cut: matrices longer or wider than a block whose last one is cut.
    """

    matrices: int = 0
    cut: int = 0
    elements: int = 0
    squares: float = 0.0
    lost: float = 0.0
    worst: float = 0.0

    def add(self, original: torch.Tensor, widened: torch.Tensor) -> None:
        """Count one matrix, [N, K] in float32, and what it became."""
        lost = widened - original
        self.matrices += 1
        self.cut += any(size > BLOCK and size % BLOCK for size in original.shape)
        self.elements += original.numel()
        self.squares += float(original.double().square().sum())
        self.lost += float(lost.double().square().sum())
        self.worst = max(self.worst, float(lost.abs().max()))

    def row(self, role: str) -> dict[str, Any]:
        """Return the role's line of the table."""
        return {
            "role": role,
            "matrices": self.matrices,
            "elements (M)": self.elements / 1e6,
            "error, % of rms": 100 * (self.lost / max(self.squares, 1e-300)) ** 0.5,
            "largest error": f"{self.worst:.2e}",
        }


def quantize_checkpoint(path: str | Path, output: str | Path, *, head: bool = False) -> dict[str, Errors]:
    """Write the block-FP8 form of the checkpoint at `path` to the folder `output`; return the error of each role.

    ``head``: of the output head as well.
    Raises ValueError, in one line, for a checkpoint that is not read or quantised already, and for a folder in use.
    """
    source, target = Path(path).expanduser(), Path(output).expanduser()
    spec = load_spec(path)
    spec = named_as_stored(spec, tensor_names(source))
    if spec.quantization is not None or (spec.experts is not None and spec.experts.in_4_bits):
        raise ValueError(f"model.path = {path} is quantised already")
    if head and spec.tied_embeddings:
        raise ValueError(f"head = true, but the output head of model.path = {path} is its embeddings; leave it out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output = {output} is not empty; give a new folder")
    Checkpoint(source, spec).close()
    config = json.loads(find_config(source).read_text("utf-8"))
    files = open_files(source)
    shapes = {name: file.get_slice(name).get_shape() for file in files.values() for name in list(file.keys())}
    matrices = Matrices.of(spec, shapes, head=head)
    kept = _kept(matrices, shapes)
    target.mkdir(parents=True, exist_ok=True)
    errors: dict[str, Errors] = defaultdict(Errors)
    file_of: dict[str, str] = {}
    total_bytes = 0
    with _progress(sum((source / file).stat().st_size for file in files)) as advance:
        for file in files:
            tensors = _quantized(source / file, matrices, errors, advance)
            save_file(tensors, target / file, metadata={"format": "pt"})
            file_of |= dict.fromkeys(tensors, file)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
        (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for other in source.iterdir():
        if (
            other.is_file()
            and other.suffix in (".json", ".model", ".txt", ".jinja")
            and not (target / other.name).exists()
        ):
            shutil.copyfile(other, target / other.name)
    return dict(errors)


@dataclass(frozen=True)
class Matrices:
    """Which tensors of a checkpoint hold matrices to quantise.

    how: what they become. alone: names of those with one each. stacks: of those with one an expert, and the names of
    the parts, EXPERT in them, into which the rows of each are cut.
    """

    how: Quantization
    alone: frozenset[str]
    stacks: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, spec: ModelSpec, stored: Iterable[str], *, head: bool) -> Matrices:
        """Return those of a model, and of its layers that predict further; of the ``head`` perhaps.

        ``stored``: the names of all tensors.
        """
        spec, names = replace(spec, quantization=Quantization(head=head), predicts_next=True), spec.names
        needed = {*tensor_shapes(spec), *(name for name in stored if name.startswith(PREDICTS_NEXT))}
        alone = frozenset(name for name in needed if spec.is_quantized(name))
        stacks: dict[str, tuple[str, ...]] = {}
        if spec.experts is not None and spec.experts.clamped is None:
            parts = {
                names.experts_gate_up: (names.expert_gate, names.expert_up),
                names.experts_down: (names.expert_down,),
            }
            of_model = names.input_norm.partition("layers.")[0]
            for before, layer in ((PREDICTS_NEXT, 0), *((of_model, layer) for layer in range(spec.num_layers))):
                for stack, its in parts.items():
                    each = [
                        name.replace(of_model, before, 1).format(layer=layer, expert=EXPERT) for name in (stack, *its)
                    ]
                    stacks[each[0]] = tuple(each[1:])
        assert spec.quantization is not None
        return cls(spec.quantization, alone, stacks)

    def in_tensor(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the matrices of a tensor with their names, [N, K] each; none where it stays as it is."""
        if name in self.alone:
            yield name, tensor
        parts = self.stacks.get(name, ())
        for expert, matrix in enumerate(tensor if parts else ()):
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                yield part.replace(EXPERT, str(expert)), rows


def _kept(matrices: Matrices, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the modules with a matrix that stays as it is, but for embeddings."""
    return sorted(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed" not in name and name not in matrices.alone
    )


def _quantized(file: Path, matrices: Matrices, errors: dict[str, Errors], advance: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of one file, quantised where they are to be, with their scales."""
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(str(file), framework="pt", device="cpu") as handle:
        for name in handle.keys():  # noqa: SIM118 (it is no dict)
            tensor = handle.get_tensor(name)
            found = False
            for matrix, original in matrices.in_tensor(name, tensor):
                original = original.float()
                values, scales = quantize_blocks(original)
                tensors[matrix], tensors[matrices.how.scale_of(matrix)] = values, scales
                errors[_role(matrix)].add(original, widen_blocks(values, scales))
                found = True
            if not found:
                tensors[name] = tensor
            advance(tensor.nbytes)
    return tensors


def _role(name: str) -> str:
    """Return a tensor's module without the numbers of layer and expert."""
    return re.sub(r"\.\d+(?=\.)", "", name).rpartition("layers.")[2].removesuffix(".weight")


@contextmanager
def _progress(total_bytes: int) -> Iterator[Any]:
    """Show a bar on a terminal; yield what advances it by bytes that are done."""
    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.fields[done]} of {task.fields[all]} GB"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("quantize", total=total_bytes, done="0.0", all=f"{total_bytes / 1e9:.1f}")

        def advance(num_bytes: int) -> None:
            bar.advance(task, num_bytes)
            bar.update(task, done=f"{bar.tasks[0].completed / 1e9:.1f}")

        yield advance


def run(config: QuantizeConfig) -> None:
    """Quantise a checkpoint, and say what that cost."""
    errors = quantize_checkpoint(config.model.path, config.output, head=config.head)
    show(f"{config.output}: block FP8", [errors[role].row(role) for role in sorted(errors)])
    if cut := sum(each.cut for each in errors.values()):
        cli.say(
            f"Of {cut} matrices the last blocks are cut, since rows or columns are no multiple of {BLOCK}: Helix reads "
            "them, transformers takes blocks of other sizes there, or refuses them"
        )


if __name__ == "__main__":
    cli.main("quantize", QuantizeConfig, run)
