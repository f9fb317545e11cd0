"""Checkpoints of state layers as people have them: the text model beside others, experts as stacks."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helix.config import ModelConfig
from helix.models.checkpoint import Checkpoint
from helix.models.loading import read_spec
from helix.models.quantization import Quantization
from helix.models.weights import layer_weights, model_weights, part_of
from helix.plan.footprint import Footprint, Storage
from helix.states.cache import StateCache
from parallel.layout import Layout
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint as transformers writes its text model, and the same as the models' files are."""
    plain = make_checkpoint(tmp_path_factory.mktemp("plain") / "model", family="qwen3_5_moe")
    whole = tmp_path_factory.mktemp("whole")
    config = json.loads((plain / "config.json").read_text())
    outer = {"model_type": "qwen3_5_moe", "tie_word_embeddings": False, "text_config": config, "vision_config": {}}
    (whole / "config.json").write_text(json.dumps(outer))
    tensors, stacks = {"model.visual.merger.norm.weight": torch.ones(4), "mtp.fc.weight": torch.ones(4, 8)}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if match := re.match(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", name):
            stacks.setdefault((match[1], match[3]), []).append((int(match[2]), tensor))
        else:
            tensors[name.replace("model.", "model.language_model.")] = tensor
        if ".layers.1." in name:  # the layer that predicts one token further
            tensors[name.replace("model.layers.1.", "mtp.layers.0.")] = tensor.clone()
    for module in {module for module, _ in stacks}:
        gate, up, down = (
            torch.stack([tensor for _, tensor in sorted(stacks[module, part])]) for part in ("gate", "up", "down")
        )
        module = module.replace("model.", "model.language_model.")
        tensors |= {f"{module}.gate_up_proj": torch.cat((gate, up), 1), f"{module}.down_proj": down}
    save_file(tensors, whole / "model.safetensors")
    return plain, whole


def weights_in(folder, layout, rank):
    """All of a rank's weights, by layer and role."""
    spec = read_spec(ModelConfig(path=str(folder)))
    part = part_of(spec, layout, rank)
    groups = [model_weights(spec, part), *(layer_weights(spec, layer, part) for layer in range(spec.num_layers))]
    read = {}
    with Checkpoint(folder, spec) as checkpoint:
        for number, weights in enumerate(groups):
            for role, weight in weights.items():
                read[number, role] = torch.empty(weight.shape)
                checkpoint.read(weight, read[number, role])
    return read


@pytest.mark.parametrize(("layout", "rank"), [(Layout(kvp=3), 1), (Layout(kvp=2, tpa=2, ep=2), 3)])
def test_files_of_all_parts_give_the_weights_of_the_text_model_alone(folders, layout, rank):
    ours, expected = weights_in(folders[1], layout, rank), weights_in(folders[0], layout, rank)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert expected[0, "final_norm"].min() > 1.5  # what the file holds exceeds one by 0.6 at least


def test_scores_that_stay_wide_come_apart_from_a_quantised_projection(folders):
    spec = read_spec(ModelConfig(path=str(folders[0])))
    whole, kept = Quantization(), Quantization(kept=("in_proj_b", "in_proj_a"))
    for how, apart in ((whole, False), (kept, True)):
        quantised = replace(spec, quantization=how)
        weights = layer_weights(quantised, 0, part_of(quantised, Layout(kvp=4), 1))
        assert weights["state_in"].quantized and ("state_scores" in weights) is apart
        scores = weights.get("state_scores")
        rows = weights["state_in"].shape[0] + (0 if scores is None else scores.shape[0])
        assert rows == 2 * 16 + 2 * 2 * 12 + 2 * 2  # a key head, and channels, gates and scores of two value heads
        assert scores is None or not scores.quantized


def test_more_ranks_than_value_heads_are_refused(folders):
    spec = read_spec(ModelConfig(path=str(folders[0])))
    few = replace(spec, states=replace(spec.states, num_value_heads=2, num_key_heads=2))
    with pytest.raises(ValueError, match="4 ranks exceed the 2 value heads of qwen3_5_moe's state layers; use fewer"):
        part_of(few, Layout(kvp=4), 0)


def test_what_states_take_is_what_is_planned(folders):
    spec, layout = read_spec(ModelConfig(path=str(folders[0]))), Layout(kvp=3)
    value_heads, device = part_of(spec, layout, 0).value_heads, torch.device("cpu")
    cache = StateCache.for_model(spec, value_heads, num_slots=3, max_run=4, dtype=torch.float32, device=device)
    footprint = Footprint(spec, layout, Storage("fp32", "fp32"))
    assert cache.num_bytes == footprint.states_bytes(3, max_run=4)
    assert [(kind.kind, kind.count) for kind in footprint.layers] == [("full", 1), ("state", 1)]
    assert footprint.token_bytes == 2 * spec.num_kv_heads * spec.head_dim * 4  # of the one layer that is full
