"""Tokens of block-FP8 checkpoints equal transformers' float32 run of what their weights mean, however they are cut."""

import json
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from helix.models.quantized import widen_blocks
from scripts.make_checkpoint import ALL, PASSKEY, WINDOWED, make_checkpoint
from scripts.quantize import quantize_checkpoint
from tests.helix.greedy import greedy_of
from tests.helix.test_parity import KV_HEADS, check, generate_body

SIZES = {"hidden": 192, "ffn": 424, "expert_ffn": 200, "heads": 12}


def widen_checkpoint(folder, *, head=False):
    """Of the checkpoint folder/plain, write folder/fp8 in block FP8, and folder/wide that means the same in float32."""
    quantize_checkpoint(folder / "plain", folder / "fp8", head=head)
    shutil.copytree(folder / "plain", folder / "wide")
    tensors = load_file(folder / "fp8" / "model.safetensors")
    wide = {
        name: widen_blocks(tensor, tensors[f"{name}_scale_inv"]) if f"{name}_scale_inv" in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    save_file(wide, folder / "wide" / "model.safetensors", metadata={"format": "pt"})
    assert "quantization_config" not in json.loads((folder / "wide" / "config.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint(family)``: folders of a block-FP8 checkpoint, and of the float32 one that means the same."""

    @cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        window = 24 if family in WINDOWED else 0
        make_checkpoint(folder / "plain", family=family, kv_heads=KV_HEADS.get(family, 4), window=window, **SIZES)
        widen_checkpoint(folder, head=family in ("llama", "deepseek_v3"))
        return str(folder / "fp8"), str(folder / "wide")

    return make


@pytest.fixture(scope="module")
def reference(checkpoint):
    """``reference(family, prompt, num_tokens)``: greedy tokens, and the gap of the two best logits at each."""
    from transformers import AutoModelForCausalLM

    def generate(family, prompt, num_tokens):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(family)[1], dtype=torch.float32)
        return greedy_of(model, prompt, num_tokens)

    return generate


CASES = [
    ("llama", 8, 1, 1),
    ("qwen2", 3, 1, 1),
    ("qwen3", 1, 4, 1),
    ("glm", 2, 2, 1),
    ("qwen3_moe", 3, 1, 1),
    ("deepseek_v2", 3, 1, 1),
    ("deepseek_v3", 6, 1, 2),
    ("glm4_moe", 2, 1, 1),
    ("mixtral", 2, 1, 2),
    ("gemma3", 2, 1, 1),
    ("gpt_oss", 2, 1, 1),
    ("mimo_v2_flash", 1, 2, 1),
    ("qwen3_next", 3, 1, 1),
    ("qwen3_5_moe", 2, 1, 1),
    *(pytest.param(family, 1, 1, 1, marks=pytest.mark.slow) for family in ("glm4", "mistral", "qwen3_5", "seed_oss")),
]


def test_no_family_is_left_out():
    assert {getattr(case, "values", case)[0] for case in CASES} == {*ALL} - {PASSKEY}


@pytest.mark.parametrize(("family", "kvp", "tpa", "ep"), CASES)
def test_tokens_equal_those_of_the_widened_weights(ranks, checkpoint, reference, family, kvp, tpa, ep):
    prompt = tuple(torch.randint(0, 256, (41,), generator=torch.Generator().manual_seed(7)).tolist())
    runs = [(16, [prompt], 12, 33, 0)]
    results = ranks(kvp * tpa).run(generate_body, checkpoint(family)[0], kvp, tpa, runs, ep=ep)
    check(results, reference, family, runs)
