"""The tool that writes block-FP8 checkpoints: transformers opens them to the same values."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helix.config import ModelConfig
from helix.models.checkpoint import Checkpoint
from helix.models.loading import read_spec
from helix.models.quantized import widen_blocks
from helix.models.weights import layer_weights
from helix.models.weights import whole as whole_part
from scripts.make_checkpoint import make_checkpoint
from scripts.quantize import QuantizeConfig, quantize_checkpoint, run


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_it_to_the_same_values(tmp_path, family):
    """Of sizes that are multiples of 128, which is all that transformers widens rightly."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    sizes = {"hidden": 256, "head_dim": 32, "ffn": 384, "expert_ffn": 128, "vocab": 384, "max_shard_size": "900KB"}
    make_checkpoint(tmp_path / "plain", family=family, **sizes)
    errors = quantize_checkpoint(tmp_path / "plain", tmp_path / "fp8", head=family == "llama")
    assert ("lm_head" in errors) == (family == "llama")
    assert all(0.01 < (each.lost / each.squares) ** 0.5 < 0.04 for each in errors.values())
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    tensors = {}
    for file in (tmp_path / "fp8").glob("*.safetensors"):
        tensors |= load_file(file)
    config = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32, quantization_config=config)
    theirs = model.state_dict()
    scaled = [name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")]
    assert len(scaled) >= 14
    for name in scaled:
        if ".experts." not in name:
            assert torch.equal(theirs[name], widen_blocks(tensors[name], tensors[f"{name}_scale_inv"])), name
    if family == "qwen3_moe":
        experts = "model.layers.0.mlp.experts."
        names = [f"{experts}3.{each}_proj.weight" for each in ("gate", "up")]
        ours = torch.cat([widen_blocks(tensors[name], tensors[f"{name}_scale_inv"]) for name in names])
        assert torch.equal(theirs[f"{experts}gate_up_proj"][3], ours)


def test_stacks_come_apart_and_what_is_not_the_text_model_stays(tmp_path):
    """Of files as those of Qwen3.5 with experts: stacks of them, a vision tower, and a layer that looks further."""
    plain, sizes = tmp_path / "plain", {"hidden": 256, "head_dim": 64, "expert_ffn": 128, "heads": 4}
    make_checkpoint(plain, family="qwen3_5_moe", **sizes)
    tensors = load_file(plain / "model.safetensors")
    expected = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([expected[f"{experts}{number}.{part}_proj.weight"] for number in range(6)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{experts}gate_up_proj": torch.cat((gate, up), 1), f"{experts}down_proj": down}
    further = {name.replace("model.layers.1.", "mtp.layers.0."): tensors[name] for name in tensors if ".1." in name}
    own = {"mtp.fc.weight": torch.randn(256, 512), "model.visual.blocks.0.mlp.up_proj.weight": torch.randn(256, 128)}
    whole = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.layers.") else name: tensor.clone()
        for name, tensor in (tensors | further).items()
    }
    whole["model.language_model.embed_tokens.weight"] = whole.pop("model.embed_tokens.weight")
    whole["model.language_model.norm.weight"] = whole.pop("model.norm.weight")
    save_file(whole | own, plain / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((plain / "config.json").read_text())
    outer = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {}, "tie_word_embeddings": False}
    (plain / "config.json").write_text(json.dumps(outer))
    errors = quantize_checkpoint(plain, fp8 := tmp_path / "fp8")
    assert {"mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"} <= errors.keys()
    made = load_file(fp8 / "model.safetensors")
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in made)
    for name, original in expected.items():
        for stored in (
            name.replace("model.", "model.language_model."),
            name.replace("model.layers.1.", "mtp.layers.0."),
        ):
            if stored in made:
                wide = widen_blocks(made[stored], made[f"{stored}_scale_inv"])
                torch.testing.assert_close(wide, original, rtol=0.07, atol=1e-3)
    assert "mtp.layers.0.mlp.experts.5.down_proj.weight" in made
    assert all(torch.equal(made[name], tensor) for name, tensor in own.items())
    kept = json.loads((fp8 / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"lm_head", "mtp.fc", "model.visual.blocks.0.mlp.up_proj", "mtp.layers.0.mlp.gate"} <= {*kept}
    assert "model.language_model.layers.1.mlp.shared_expert_gate" in kept
    matrices = {name.removesuffix(".weight") for name, each in made.items() if each.dim() == 2 and "scale" not in name}
    narrow = {name.removesuffix(".weight") for name, each in made.items() if each.dtype == torch.float8_e4m3fn}
    assert matrices - narrow - {"model.language_model.embed_tokens"} == {*kept}
    spec = read_spec(ModelConfig(path=str(fp8)))
    roles = {
        role for layer in range(2) for role, w in layer_weights(spec, layer, whole_part(spec)).items() if w.quantized
    }
    assert {"experts_gate_up", "experts_down", "shared_down", "state_in", "qkv"} <= roles
    Checkpoint(fp8, spec).close()


def test_what_cannot_be_written_is_refused_and_the_table_names_every_role(tmp_path, capsys):
    plain, out = make_checkpoint(tmp_path / "plain"), tmp_path / "out"
    config = QuantizeConfig(output=str(out))
    config.model.path = str(plain)
    run(config)
    text = capsys.readouterr().out
    assert all(role in text for role in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
    with pytest.raises(ValueError, match="output = .* is not empty; give a new folder"):
        quantize_checkpoint(plain, out)
    with pytest.raises(ValueError, match="is quantised already"):
        quantize_checkpoint(out, tmp_path / "again")
    make_checkpoint(tmp_path / "tied", tied=True)
    with pytest.raises(ValueError, match="head = true, but the output head of model.path = .* is its embeddings"):
        quantize_checkpoint(tmp_path / "tied", tmp_path / "none", head=True)
    with pytest.raises(ValueError, match="output is empty"):
        QuantizeConfig()
    assert "Of 6 matrices the last blocks are cut" in text  # 160 units
    make_checkpoint(oss := tmp_path / "oss", family="gpt_oss")
    settings = json.loads((oss / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (oss / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is quantised already"):
        quantize_checkpoint(oss, tmp_path / "again")
