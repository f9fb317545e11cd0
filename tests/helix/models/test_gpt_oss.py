"""gpt-oss: weights of MXFP4 files are those that transformers widens, whatever slices of them a rank reads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helix.models.checkpoint import Checkpoint, CheckpointError
from helix.models.families import load_spec, spec_of
from helix.models.weights import layer_weights, part_of
from parallel.layout import Layout
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model whose experts have 4 bits, and the same one as transformers widens it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed, wide = (tmp_path_factory.mktemp("oss") / name for name in ("packed", "wide"))
    for path in (packed, wide):
        make_checkpoint(path, family="gpt_oss", window=24, layers=2, experts=3, ffn=96, hidden=64)
    tensors = load_file(wide / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    in_4_bits = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(110, 135, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        del in_4_bits[name]
        in_4_bits |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, wide / "model.safetensors")
    save_file(in_4_bits, packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, wide


@pytest.mark.parametrize("layout", [Layout(), Layout(kvp=2, tpa=2), Layout(kvp=4, tpf=2, ep=2), Layout(kvp=8)])
def test_experts_of_4_bits_are_those_that_transformers_widens(folders, layout):
    specs = [load_spec(path) for path in folders]
    assert specs[0].experts.in_4_bits and not specs[1].experts.in_4_bits and specs[0].quantization is None
    for rank in {0, layout.world_size - 1}:
        read = []
        for path, spec in zip(folders, specs, strict=True):
            weights = layer_weights(spec, 1, part_of(spec, layout, rank))
            with Checkpoint(path, spec) as checkpoint:
                filled = {role: torch.empty(weight.shape) for role, weight in weights.items()}
                for role, weight in weights.items():
                    checkpoint.read(weight, filled[role])
            read.append(filled)
        assert read[0].keys() == read[1].keys() and "experts_down_bias" in read[0]
        for role, weight in read[0].items():
            assert torch.equal(weight, read[1][role]), role


def test_what_is_no_mxfp4_is_refused(folders, tmp_path):
    packed, _ = folders
    tensors = load_file(packed / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj_scales"))
    tensors[name] = tensors[name].float()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="down_proj_scales has dtype F32, must be U8, of MXFP4"):
        Checkpoint(tmp_path, load_spec(packed))
    config = {"model_type": "llama", "quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(ValueError, match="quant_method = 'mxfp4'; Helix reads"):
        spec_of(config, "x")
