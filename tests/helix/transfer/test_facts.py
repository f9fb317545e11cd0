"""What groups must agree on is told apart, and so are processes that run, have ended, or are others."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helix.models.spec import load_spec
from helix.transfer.facts import Process, find_mismatch, fingerprint, make_facts
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("facts") / "model", layers=1)


def facts(folder, **changes):
    return make_facts(load_spec(folder), **{"block_size": 16, "dtype": "float32", "weights": folder} | changes)


def test_groups_of_one_model_agree(folder):
    assert find_mismatch(facts(folder), json.loads(json.dumps(facts(folder)))) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block_size": 64}, "cache.block_size = 16 in the decode group and 64 in the prefill group"),
        ({"dtype": "bfloat16"}, "model.dtype = float32 in the decode group and bfloat16 in the prefill group"),
        ({"weights": None}, "model's fingerprint = "),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(folder, changes, told):
    assert find_mismatch(facts(folder), facts(folder, **changes)).startswith(told)


def test_models_of_other_layers_and_facts_of_another_version_do_not_agree(folder, tmp_path):
    other = make_checkpoint(tmp_path / "deeper", layers=2)
    assert find_mismatch(facts(folder), facts(other)).startswith("model's layers = 1 in the decode group and 2 in")
    fewer = {name: value for name, value in facts(folder).items() if name != "model.dtype"}
    assert "model.dtype = None in the decode group" in find_mismatch(fewer, facts(folder))
    assert "model.dtype = float32 in the decode group and None" in find_mismatch(facts(folder), fewer)


def test_the_fingerprint_tells_other_weights_and_other_settings(folder, tmp_path):
    spec = load_spec(folder)
    other = make_checkpoint(tmp_path / "seed", layers=1, seed=1)
    prints = {
        fingerprint(spec, folder),
        fingerprint(spec, other),
        fingerprint(spec, None),
        fingerprint(replace(spec, rms_eps=0.1), folder),
        fingerprint(replace(spec, rope=replace(spec.rope, inv_freq=spec.rope.inv_freq * 2)), folder),
    }
    assert len(prints) == 5
    assert fingerprint(load_spec(folder), folder) in prints


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
