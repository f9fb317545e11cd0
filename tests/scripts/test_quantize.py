"""The tool that writes block-FP8 checkpoints: transformers opens them to the same values."""

import pytest
import torch
from safetensors.torch import load_file

from helix.models.quantized import widen_blocks
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
