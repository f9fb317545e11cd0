"""Checkpoints that are refused, in one line that names the file or tensor, before anything is read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helix.models.checkpoint import Checkpoint, CheckpointError
from helix.models.families import load_spec
from helix.models.spec import ModelSpec
from scripts.make_checkpoint import make_checkpoint


def refusal(path: Path, spec: ModelSpec) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint(path, spec)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    spec = load_spec(path)
    (path / "model.safetensors").unlink()
    assert "has no weights: neither model.safetensors nor model.safetensors.index.json" in refusal(path, spec)
    assert "has no weights" in refusal(tmp_path / "nowhere", spec)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", max_shard_size="150KB")
    spec = load_spec(path)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    total = len(list(path.glob("*.safetensors"))) + 1
    assert f"lacks 1 of {total} files that model.safetensors.index.json names: {shard.name}" in refusal(path, spec)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1], ids=lambda keep: f"keep {keep}")
@pytest.mark.parametrize("shards", ["", "150KB"], ids=("single", "sharded"))
def test_truncated_file_is_named(tmp_path: Path, shards: str, keep: float) -> None:
    path = make_checkpoint(tmp_path / "model", max_shard_size=shards)
    spec = load_spec(path)
    file = sorted(path.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else keep])
    assert f"{file} is truncated or not a safetensors file" in refusal(path, spec)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", family="qwen2")
    rewrite(path, lambda tensors: [tensors.pop(f"model.layers.1.self_attn.{x}_proj.bias") for x in "qkv"])
    text = refusal(path, load_spec(path))
    assert "lacks 3 tensors of a qwen2 model: model.layers.1.self_attn.q_proj.bias, " in text
    rewrite(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lacks 4 tensors of a qwen2 model: lm_head.weight, " in refusal(path, load_spec(path))
    assert refusal(path, load_spec(path)).endswith(", ...")


def test_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(path, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    assert f"{name} has shape (64, 159), config.json implies (64, 160)" in refusal(path, load_spec(path))


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    assert f"{name} has dtype F8_E4M3, must be one of F64, F32, F16, BF16" in refusal(path, load_spec(path))


def test_tensors_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    spec = load_spec(path)
    rewrite(path, lambda tensors: tensors.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    Checkpoint(path, spec).close()
    name = "model.layers.1.self_attn.o_proj.bias"
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(64)}))
    assert f"has 1 tensors that a llama model does not use: {name}" in refusal(path, spec)
