"""What groups must agree on is told apart, and so are processes that run, have ended, or are others."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention.pages import FP8
from helix.models.families import load_spec
from helix.models.spec import Latent
from helix.transfer.facts import Process, find_mismatch, fingerprint, make_facts
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("facts") / "model", layers=1)


def facts_of(spec, weights, *, block_size=16, dtypes=(torch.float32, torch.float32)):
    return make_facts(spec, block_size=block_size, dtypes=dtypes, weights=weights)


def facts(folder, **changes):
    return facts_of(load_spec(folder), **{"weights": folder} | changes)


def test_groups_of_one_model_agree(folder):
    assert find_mismatch(facts(folder), json.loads(json.dumps(facts(folder)))) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block_size": 64}, "cache.block_size = 16 in the decode group and 64 in the prefill group"),
        ({"dtypes": (torch.bfloat16,) * 2}, "model.dtype = float32 in the decode group and bfloat16 in the prefill"),
        (
            {"dtypes": (torch.float32, FP8)},
            "cache.dtype = float32 in the decode group and float8_e4m3fn in the prefill",
        ),
        ({"weights": None}, "fingerprint of the model's weights = "),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(folder, changes, told):
    assert find_mismatch(facts(folder), facts(folder, **changes)).startswith(told)


def test_models_of_other_layers_and_facts_of_another_version_do_not_agree(folder, tmp_path):
    other = make_checkpoint(tmp_path / "deeper", layers=2)
    assert find_mismatch(facts(folder), facts(other)).startswith(
        "model's num_hidden_layers = 1 in the decode group and 2 in"
    )
    fewer = {name: value for name, value in facts(folder).items() if name != "model.dtype"}
    assert "model.dtype = None in the decode group" in find_mismatch(fewer, facts(folder))
    assert "model.dtype = float32 in the decode group and None" in find_mismatch(facts(folder), fewer)


def test_what_may_differ_is_no_fact(folder):
    """A group drafts in its own way, and takes prompts of its own length."""
    spec = load_spec(folder)
    other = replace(spec, max_position=77, has_head=True, eos_token_ids=(3,))
    assert find_mismatch(facts(folder), facts_of(other, folder)) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rms_eps": 0.1}, "model's rms_norm_eps = 1e-06 in the decode group and 0.1 in the prefill group; make them"),
        ({"ffn_size": 8}, "model's intermediate_size = 160 in the decode group and 8 in the prefill group"),
        ({"family": "other"}, "model's model_type = llama in the decode group and other in the prefill group"),
        ({"sinks": ("window",)}, "model's sinks = [] in the decode group and ['window'] in the prefill group"),
        ({"latent": Latent(8, 4, 4, 4, None, 1.0)}, "model's kv_lora_rank = None in the decode group and 8 in the"),
    ],
)
def test_a_field_of_the_config_that_differs_is_named_with_both_values(folder, changes, told):
    spec = load_spec(folder)
    assert find_mismatch(facts(folder), facts_of(replace(spec, **changes), folder)).startswith(told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_chosen": 3}, "model's num_experts_per_tok = 2 in the decode group and 3 in the prefill group"),
        ({"normalised": False}, "model's norm_topk_prob = True in the decode group and False in the prefill group"),
        ({"dense_layers": frozenset()}, "model's layers without experts = [1] in the decode group and [] in"),
    ],
)
def test_experts_that_differ_are_named_with_both_values(tmp_path, changes, told):
    spec = load_spec(make_checkpoint(tmp_path / "model", family="qwen3_moe"))
    ours = facts_of(spec, None)
    assert find_mismatch(ours, json.loads(json.dumps(ours))) is None
    assert find_mismatch(ours, facts_of(replace(spec, experts=replace(spec.experts, **changes)), None)).startswith(told)


def test_rope_that_differs_is_named_with_the_fields_that_it_comes_from(folder):
    spec = load_spec(folder)
    for rope in (
        replace(spec.rope, inv_freq=spec.rope.inv_freq * 2),
        replace(spec.rope, attention_scaling=1.5),
    ):
        told = find_mismatch(facts(folder), facts_of(replace(spec, rope=rope), folder))
        assert told.startswith("fingerprint of the model's RoPE (rope_theta, rope_scaling) = ")


def test_weights_that_differ_are_named(folder, tmp_path):
    other = make_checkpoint(tmp_path / "seed", layers=1, seed=1)
    told = find_mismatch(facts(folder), facts(other))
    assert told == (
        f"fingerprint of the model's weights = {fingerprint(folder)} in the decode group and {fingerprint(other)} in "
        "the prefill group; make them equal"
    )


def stat(pid):
    return Path(f"/proc/{pid}/stat").read_text()


def test_a_process_has_ended_once_it_is_killed_and_also_before_anyone_waits_for_it():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = int(stat(child.pid).rpartition(") ")[2].split()[19])
    process = replace(Process.current(), pid=child.pid, started=started)
    assert not process.has_ended() and not Process.current().has_ended()
    assert replace(process, started=started - 1).has_ended(), "its number is another's now"
    child.kill()
    while stat(child.pid).rpartition(") ")[2][0] != "Z":
        pass
    assert process.has_ended()
    child.wait()
    assert process.has_ended()


def test_nothing_is_known_of_processes_of_other_machines():
    assert not replace(Process.current(), machine="another", pid=2**22 + 1).has_ended()
    assert not replace(Process.current(), machine="", pid=2**22 + 1).has_ended()
