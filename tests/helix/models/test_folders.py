"""Checkpoint folders as people have them: read where it is certain what is meant, else one line names what is there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helix.config import ModelConfig
from helix.models.loading import open_checkpoint, read_spec
from helix.models.spec import ModelSpec
from helix.models.weights import model_weights, tensor_shapes, whole
from scripts.make_checkpoint import make_checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    return {
        "one": make_checkpoint(folder / "one"),
        "tied": make_checkpoint(folder / "tied", tied=True),
        "shards": make_checkpoint(folder / "shards", max_shard_size="150KB"),
    }


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE)


def read(path: Path) -> tuple[ModelSpec, Tensors]:
    """Return the spec, and the model's embedding, head and last norm as a run reads them."""
    config = ModelConfig(path=str(path))
    spec = read_spec(config)
    checkpoint = open_checkpoint(config, spec)
    assert checkpoint is not None
    with checkpoint:
        weights = model_weights(spec, whole(spec))
        out = {role: torch.empty(weight.shape) for role, weight in weights.items()}
        for role, weight in weights.items():
            checkpoint.read(weight, out[role])
    return spec, out


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match="^model.path = ") as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(left: Tensors, right: Tensors) -> bool:
    return all(torch.equal(left[role], right[role]) for role in left | right)


@pytest.mark.filterwarnings("ignore")  # transformers warns that the config and the file disagree
@pytest.mark.parametrize("kept", ["both", "head", "embedding"])
def test_head_of_a_tied_model_is_that_of_transformers(copy: Callable[[str], Path], kept: str) -> None:
    path = copy("tied")
    own = torch.randn(320, 64, generator=torch.Generator().manual_seed(1))

    def change(tensors: Tensors) -> None:
        if kept != "embedding":
            tensors["lm_head.weight"] = own
        if kept == "head":
            tensors.pop("model.embed_tokens.weight")

    rewrite(path, change)
    reference = AutoModelForCausalLM.from_pretrained(path)
    spec, found = read(path)
    assert spec.tied_embeddings == (kept != "both")
    assert torch.equal(found["lm_head"], reference.lm_head.weight)
    assert torch.equal(found["embedding"], reference.model.embed_tokens.weight)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "", "_orig_mod.model."])
def test_renamed_prefixes_are_read(copy: Callable[[str], Path], prefix: str) -> None:
    path = copy("one")
    _, wanted = read(path)
    head = prefix.replace("model.language_model.", "") + "lm_head.weight"

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.") if name.startswith("model.") else head] = tensors.pop(name)
        tensors["visual.blocks.0.norm1.weight"] = torch.ones(3)

    rewrite(path, rename)
    spec, found = read(path)
    assert same(found, wanted)
    assert head in tensor_shapes(spec)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.self_attn.bias",
        "model.rotary_emb.inv_freq",
        "model.causal_mask",
        "model.layers.2.eh_proj.weight",
        "v_head.summary.weight",
    ],
)
def test_buffers_and_modules_that_nothing_needs_are_left_out(copy: Callable[[str], Path], name: str) -> None:
    path = copy("one")
    _, wanted = read(path)
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert same(read(path)[1], wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head.bias", "the checkpoint has lm_head.bias, which a llama model here does not add"),
        ("model.norm.bias", "the checkpoint has model.norm.bias"),
        ("model.layers.4.mlp.up_proj.weight", "has layers up to 4, but config.json has num_hidden_layers = 2; set it"),
    ],
)
def test_tensors_that_would_change_results_are_refused(copy: Callable[[str], Path], name: str, message: str) -> None:
    path = copy("one")
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert message in refusal(path)


def write_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def shards_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*.safetensors"))


def point_all_at_the_first(path: Path) -> None:
    write_index(path, lambda names: names.update(dict.fromkeys(names, shards_of(path)[0])))


SHARD_CHANGES: dict[str, Callable[[Path], object]] = {
    "no index": lambda path: (path / INDEX).unlink(),
    "broken index": lambda path: (path / INDEX).write_text("{"),
    "index of other files": lambda path: write_index(path, lambda names: names.update(dict.fromkeys(names, "gone"))),
    "index of the first file": point_all_at_the_first,
    "index of one file more": lambda path: write_index(path, lambda names: names.update(x="gone.safetensors")),
    "an older set beside it": lambda path: (path / "model-00001-of-00099.safetensors").write_bytes(b"old"),
}


@pytest.mark.parametrize("change", SHARD_CHANGES)
def test_complete_shards_are_read_whatever_the_index_says(copy: Callable[[str], Path], change: str) -> None:
    path = copy("shards")
    _, wanted = read(path)
    SHARD_CHANGES[change](path)
    assert same(read(path)[1], wanted)


def test_whole_file_is_read_beside_an_index_of_other_files_and_under_another_name(copy: Callable[[str], Path]) -> None:
    path = copy("one")
    _, wanted = read(path)
    (path / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert same(read(path)[1], wanted)
    (path / INDEX).unlink()
    (path / SINGLE).rename(path / "weights.safetensors")
    assert same(read(path)[1], wanted)


def without(path: Path, shard: int) -> None:
    (path / shards_of(path)[shard]).unlink()


def only(path: Path, name: str, content: bytes = b"x") -> None:
    for file in [*path.glob("*.safetensors*"), path / "config.json"]:
        file.unlink(missing_ok=True)
    (path / name).write_bytes(content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a shard is missing": ("shards", lambda path: without(path, 1), "files that model.safetensors.index.json names"),
    "a shard and the index": (
        "shards",
        lambda path: [without(path, 1), (path / INDEX).unlink()],
        "lacks 1 of ",
    ),
    "two files without index": (
        "one",
        lambda path: [
            shutil.copy(path / SINGLE, path / "b.safetensors"),
            (path / SINGLE).rename(path / "a.safetensors"),
        ],
        "holds a.safetensors, b.safetensors but no model.safetensors.index.json",
    ),
    "broken index alone": (
        "one",
        lambda path: [(path / SINGLE).unlink(), (path / INDEX).write_text('{"weight_map": {"a": 1}}')],
        "is not an index of shards",
    ),
    "pointer": ("one", lambda path: (path / SINGLE).write_bytes(POINTER), "is a git-lfs pointer, not the file itself"),
    "pointer of a config": ("one", lambda path: (path / "config.json").write_bytes(POINTER), "run git lfs pull"),
    "adapter": (
        "one",
        lambda path: only(path, "adapter_config.json", b"{}"),
        "holds an adapter (LoRA), no whole model",
    ),
    "adapter beside weights": (
        "one",
        lambda path: (path / "adapter_config.json").write_text("{}"),
        "remove adapter_config.json to run the weights without it",
    ),
    "pickles": (
        "one",
        lambda path: (path / SINGLE).rename(path / "pytorch_model-00001-of-00002.bin"),
        "only pickle files (pytorch_model-00001-of-00002.bin), refused: Helix reads safetensors only; convert with",
    ),
    "gguf": (
        "one",
        lambda path: only(path, "m.Q4_0.gguf"),
        "holds only GGUF files (m.Q4_0.gguf), refused: Helix reads",
    ),
    "onnx": ("one", lambda path: (path / SINGLE).rename(path / "model.onnx"), "only another framework's files"),
    "cache folder": (
        "one",
        lambda path: shutil.copytree(path, path / "snapshots" / "abc") and only(path, "x"),
        "holds a model in snapshots/abc; give that folder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_folders_are_named_in_one_line(copy: Callable[[str], Path], case: str) -> None:
    name, change, message = REFUSED[case]
    path = copy(name)
    change(path)
    assert message in refusal(path)


def test_files_given_as_a_folder_are_named(tmp_path: Path) -> None:
    for name, message in (("m.gguf", "is a GGUF file; python -m scripts.import_gguf"), (SINGLE, "give its folder")):
        (tmp_path / name).write_bytes(b"GGUF")
        assert message in refusal(tmp_path / name)


def test_config_of_an_editor_with_a_byte_order_mark_is_read(copy: Callable[[str], Path]) -> None:
    path = copy("one")
    (path / "config.json").write_bytes(b"\xef\xbb\xbf" + (path / "config.json").read_bytes())
    assert read(path)[0].num_layers == 2
