"""Checkpoints of 8 bits: what a rank reads of them, and what is refused in one line."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from helix.models.checkpoint import Checkpoint, CheckpointError
from helix.models.families import load_spec
from helix.models.parts import Part
from helix.models.quantized import Quantized, widen_blocks
from helix.models.tensor_names import named_as_stored
from helix.models.weight_files import tensor_names
from helix.models.weights import layer_weights, model_weights, whole
from scripts.make_checkpoint import FAMILIES, make_checkpoint
from scripts.quantize import quantize_checkpoint

SIZES = {"hidden": 192, "head_dim": 32, "ffn": 416, "expert_ffn": 200}
PARTS = (
    Part((2, 4), (1, 2), (3, 4), (33, 270), (0, 1), (1, 4), (5, 190), (11, 160)),
    Part((4, 4), (1, 1), (0, 0), (7, 7), (0, 1), (2, 3), (7, 7), (7, 7)),
)


def quantised(folder: Path, **recipe) -> Path:
    make_checkpoint(folder / "plain", **(SIZES | recipe))
    quantize_checkpoint(folder / "plain", folder / "fp8")
    return folder / "fp8"


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def configure(path: Path, settings) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))


def room(weight):
    if weight.quantized:
        return Quantized.empty(weight.shape[0], weight.columns, "cpu")
    return torch.empty(weight.shape)


def widened(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path / "model.safetensors")
    return {
        name: widen_blocks(tensor, tensors[f"{name}_scale_inv"]) if f"{name}_scale_inv" in tensors else tensor
        for name, tensor in tensors.items()
    }


def check_parts(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    spec = load_spec(path)
    with Checkpoint(path, spec) as checkpoint:
        for part in (*PARTS, whole(spec)):
            for layer in range(spec.num_layers):
                for role, weight in layer_weights(spec, layer, part).items():
                    out = room(weight)
                    checkpoint.read(weight, out)
                    if not out.numel():
                        continue
                    pieces = [
                        tensors[piece.name][
                            slice(*piece.rows or (None,)), *([slice(*piece.cols)] if piece.cols else [])
                        ]
                        for piece in weight.pieces
                    ]
                    pieces = [
                        F.pad(each, (0, 0, 0, piece.zeros)) if piece.zeros else each
                        for each, piece in zip(pieces, weight.pieces, strict=True)
                    ]
                    ours = out.widen(0, weight.shape[0], torch.float32) if weight.quantized else out
                    assert torch.equal(ours, torch.cat(pieces)), role


@pytest.mark.parametrize("family", [*FAMILIES, "mimo_v2_flash"])
def test_slices_keep_the_scales_of_their_place_in_the_whole(tmp_path, family):
    path = quantised(tmp_path, family=family)
    spec = load_spec(path)
    roles = {role for layer in range(2) for role, w in layer_weights(spec, layer, whole(spec)).items() if w.quantized}
    assert {"qkv", "o", "gate_up", "down"} <= roles
    if spec.experts is not None:
        assert {"experts_gate_up", "experts_down"} <= roles
    check_parts(path, widened(path))


def test_scales_may_be_powers_of_two_in_8_bits(tmp_path):
    path = quantised(tmp_path, family="qwen3")

    def round_up(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].log2().ceil().exp2().to(torch.float8_e8m0fnu)

    rewrite(path, round_up)
    tensors = load_file(path / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight_scale_inv"].dtype == torch.float8_e8m0fnu
    wide = {
        name: widen_blocks(w, tensors[f"{name}_scale_inv"].float()) if f"{name}_scale_inv" in tensors else w
        for name, w in tensors.items()
    }
    check_parts(path, wide)


LINEAR = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True}}


def compressed(strategy):
    groups = {"group_0": LINEAR | {"weights": LINEAR["weights"] | {"strategy": strategy}}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    return settings | {"ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("settings", "of_rows", "suffix"),
    [
        (compressed("channel"), True, "weight_scale"),
        (compressed("tensor"), False, "weight_scale"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, True, "weight_scale"),
        ({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "x.*"]}}, False, "weight_scale"),
        ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, False, "weight_scale"),
        ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, False, "weight_scale_inv"),
    ],
    ids=["compressed, rows", "compressed, matrices", "modelopt, rows", "modelopt, a file", "AutoFP8", "transformers"],
)
def test_scales_may_be_of_rows_or_matrices(tmp_path, settings, of_rows, suffix):
    path = quantised(tmp_path, family="llama")
    wide = {}

    def requantise(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            scale = torch.rand(tensors[weight].shape[0], 1) + 0.5 if of_rows else torch.rand(()) + 0.5
            del tensors[name]
            module = weight.removesuffix("weight")
            tensors |= {f"{module}{suffix}": scale, f"{module}input_scale": torch.ones(())}
            wide[weight] = tensors[weight].float() * scale

    rewrite(path, requantise)
    if "quant_method" in settings:
        configure(path, settings)
    else:
        configure(path, None)
        (path / "hf_quant_config.json").write_text(json.dumps(settings))
    check_parts(path, load_file(path / "model.safetensors") | wide)


def test_matrices_of_16_bits_beside_quantised_ones_widen_what_they_are_stacked_with(tmp_path):
    path = quantised(tmp_path, family="llama")
    tensors, name = widened(path), "model.layers.1.self_attn.k_proj"
    rewrite(path, lambda old: (old.update({f"{name}.weight": tensors[f"{name}.weight"]}),
                               old.pop(f"{name}.weight_scale_inv")))  # fmt: skip
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    configure(path, settings | {"modules_to_not_convert": ["lm_head", name]})
    spec = load_spec(path)
    assert [layer_weights(spec, layer, whole(spec))["qkv"].quantized for layer in (0, 1)] == [True, False]
    check_parts(path, tensors)


def test_whether_the_head_has_8_bits_is_what_its_files_say(tmp_path):
    make_checkpoint(tmp_path / "plain", **SIZES)
    quantize_checkpoint(tmp_path / "plain", path := tmp_path / "fp8", head=True)
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == [] and load_spec(path).is_quantized("lm_head.weight")
    tensors = widened(path)

    def head():
        spec = named_as_stored(load_spec(path), tensor_names(path))
        weight = model_weights(spec, whole(spec))["lm_head"]
        out = room(weight)
        with Checkpoint(path, spec) as checkpoint:
            checkpoint.read(weight, out)
        wide = out.widen(0, out.shape[0], torch.float32) if weight.quantized else out
        assert torch.equal(wide, tensors["lm_head.weight"])
        return weight.quantized

    assert head()
    configure(path, {name: each for name, each in settings.items() if name != "modules_to_not_convert"})
    assert head() and not load_spec(path).is_quantized("lm_head.weight")
    rewrite(path, lambda old: (old.update({"lm_head.weight": tensors["lm_head.weight"]}),
                               old.pop("lm_head.weight_scale_inv")))  # fmt: skip
    configure(path, settings)
    assert not head()


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(f"{UP}_scale_inv"), rf"lacks {UP}_scale_inv, whose shape must be \(4, 2\), a scale for each"),
        (
            lambda t: t.update({f"{UP}_scale_inv": t[f"{UP}_scale_inv"].T}),
            rf"{UP}_scale_inv has shape \(2, 4\), must be \(4, 2\), a scale for each block of .*; it is transposed",
        ),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(4, 3)}), r"_scale_inv has shape \(4, 3\), must be \(4, 2\)"),
        (lambda t: t.update({UP: t[UP].float()}), rf"{UP}, of shape \(416, 192\), has dtype F32, but .* F8_E4M3"),
        (lambda t: t.update({f"{UP}_scale_inv": torch.ones(4, 2, dtype=torch.int32)}), "has dtype I32, must be one"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}),
            "model.norm.weight has dtype F8_E4M3, must be one of .*; quantization_config does not name it",
        ),
    ],
)  # fmt: skip
def test_bad_scales_are_named_with_their_shape(tmp_path, change, problem):
    path = quantised(tmp_path, family="llama")
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=problem) as error:
        Checkpoint(path, load_spec(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_named_when_they_are_read(tmp_path, value):
    path = quantised(tmp_path, family="llama")
    rewrite(path, lambda tensors: tensors[f"{UP}_scale_inv"][3, 1:].fill_(value))
    spec = load_spec(path)
    first, last = (Part((0, 1), (0, 1), (0, 1), rows, (0, 1), (0, 0), (0, 0), (0, 0)) for rows in ((0, 9), (399, 416)))
    with Checkpoint(path, spec) as checkpoint:
        for part, refused in ((first, False), (last, True)):
            weight = layer_weights(spec, 0, part)["gate_up"]
            with pytest.raises(CheckpointError, match=f"{UP}_scale_inv has scales that") if refused else nullcontext():
                checkpoint.read(weight, room(weight))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method = 'gptq'; Helix reads weights of 16 and 32 bits, fp8"),
        ({"quant_method": "awq", "bits": 4}, "quant_method = 'awq'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"_block_size = \[64, 128\]; valid: \[128, 128\]"),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
            "activation_scheme = 'static'; valid: dynamic",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo = 'NVFP4'; Helix reads"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["("]}, "is no regular expression"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format = 'pack-quantized'; int4 or int8"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "NVFP4 weights; Helix reads"),
    ],
)  # fmt: skip
def test_other_methods_are_refused_by_name(tmp_path, settings, problem):
    path = make_checkpoint(tmp_path / "model")
    configure(path, settings)
    with pytest.raises(ValueError, match=problem) as error:
        load_spec(path).is_quantized("model.layers.0.self_attn.q_proj.weight")
    assert "\n" not in str(error.value)
