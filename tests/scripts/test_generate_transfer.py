"""The main job with its prompts computed by another group: one world split in two, and two worlds that meet."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import scripts.generate
from helix.config import CacheConfig, PrefillConfig, TransferConfig
from helix.prepare import config_of_part
from scripts import cli, ending
from scripts.generate import GenerateConfig, run
from scripts.make_checkpoint import make_checkpoint
from tests.helix.transfer.conftest import reserved_ports

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "transfer.md").read_text("utf-8")
SMALL = ["runtime.device=cpu", "cache.num_pages=64", "scheduler.prefill_chunk=32", "model.dtype=float32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("transfer") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    draw = random.Random(3)
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    lines = [{"id": f"p{n}", "prompt_token_ids": draw.choices(range(256), k=n)} for n in (3, 100, 40)]
    lines += [{"id": "bad", "prompt_token_ids": []}, {"id": "text", "prompt": "a text", "sampling": {"logprobs": 1}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def port():
    """A port that is this test's alone."""
    with reserved_ports(1) as [port]:
        yield port


def start(num_ranks, *arguments, folder, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.Popen(
        [*(command if num_ranks > 1 else [sys.executable]), "-m", "scripts.generate", *SMALL, *arguments],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def expected(model, prompts, tmp_path_factory):
    """The output lines of a run that transfers nothing."""
    code, out, err = end(start(1, f"model.path={model}", f"prompts={prompts}", folder=tmp_path_factory.mktemp("plain")))
    assert code == 0, err
    return lines_of(out)


def lines_of(text):
    """Output lines without their log-probabilities, which another layout rounds otherwise."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line["logprobs"] = [entry["token_id"] for entry in line.get("logprobs", [])]
    return lines


def test_one_world_split_in_two_writes_the_lines_of_a_plain_run(model, prompts, expected, tmp_path):
    code, out, err = end(
        start(
            3,
            *(f"model.path={model}", f"prompts={prompts}", "output=out.jsonl", "metrics=metrics.json"),
            *("transfer.prefill_ranks=2", "transfer.prefill.kvp=2", "transfer.prefill.tpa=1"),
            folder=tmp_path,
        )
    )
    assert code == 0, err
    assert lines_of((tmp_path / "out.jsonl").read_text()) == expected
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["layout"]["kvp"] == metrics["world_size"] == 1
    transfers = metrics["transfer"]
    assert (transfers["requests"], transfers["short"], transfers["retried"]) == (1, 3, 0)
    assert metrics["prefill_tokens"] == 3 + 40 + len("a text")
    assert out == "" and "Traceback" not in err


@pytest.mark.slow
def test_two_worlds_that_meet_write_the_lines_of_a_plain_run(model, prompts, expected, port, tmp_path):
    meet = [f"model.path={model}", f"transfer.address=127.0.0.1:{port}"]
    secret = {"HELIX_TRANSFER_SECRET": "known to both of these"}
    prefill = start(1, *meet, "transfer.role=prefill", folder=tmp_path, **secret)
    decode = start(1, *meet, "transfer.role=decode", f"prompts={prompts}", folder=tmp_path, **secret)
    code, out, err = end(decode)
    assert code == 0, err
    assert lines_of(out) == expected
    code, out, err = end(prefill)
    assert (code, out) == (0, ""), err


@pytest.mark.slow
def test_groups_that_do_not_agree_both_end_with_both_values(model, prompts, port, tmp_path):
    meet = [f"model.path={model}", f"transfer.address=127.0.0.1:{port}"]
    secret = {"HELIX_TRANSFER_SECRET": "known to both of these"}
    prefill = start(1, *meet, "transfer.role=prefill", "cache.block_size=16", folder=tmp_path, **secret)
    decode = start(1, *meet, "transfer.role=decode", f"prompts={prompts}", folder=tmp_path, **secret)
    for process in (decode, prefill):
        code, out, err = end(process)
        assert code == 2 and out == ""
        said = [line for line in err.splitlines() if line.startswith("error")]
        assert said == ["error: cache.block_size = 64 in the decode group and 16 in the prefill group; make them equal"]
        assert "Traceback" not in err


def test_a_missing_secret_ends_the_command_before_anything_is_loaded(prompts, tmp_path):
    env = {"HELIX_TRANSFER_SECRET": ""}
    code, out, err = end(
        start(
            1,
            *("model.path=nowhere", "transfer.role=decode", "transfer.address=127.0.0.1:29600", f"prompts={prompts}"),
            folder=tmp_path,
            **env,
        )
    )
    assert (code, out) == (2, "")
    assert "error: HELIX_TRANSFER_SECRET is not set" in err


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"role": "prefil"}, "transfer.role = 'prefil' must be one of prefill, decode"),
        ({"role": "decode"}, "transfer.role = decode needs transfer.address=HOST:PORT"),
        ({"role": "decode", "prefill_ranks": 2, "address": "a:1"}, "transfer.prefill_ranks = 2 splits one world"),
        ({"role": "decode", "address": "29600"}, "transfer.address = 29600 must be HOST:PORT"),
        ({"role": "decode", "address": "host:x"}, "transfer.address = host:x must be HOST:PORT"),
        ({"role": "decode", "address": "host:70000"}, "transfer.address = host:70000 must be HOST:PORT"),
        ({"address": "host:1"}, "transfer.address = host:1 needs transfer.role"),
        ({"prefill": PrefillConfig(kvp=2)}, "transfer.prefill_ranks splits; set it"),
        ({"prefill_ranks": -1}, "transfer.prefill_ranks = -1 must be at least 0"),
        ({"timeout_s": 0.0}, "transfer.timeout_s = 0.0 must be at least 0.1"),
        ({"connect_timeout_s": 0.0}, "transfer.connect_timeout_s = 0.0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused_with_the_rule_and_a_way_out(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        TransferConfig(**settings)


def test_a_prefill_layout_below_one_is_refused():
    with pytest.raises(ValueError, match="transfer.prefill.tpa = 0 must be at least 1"):
        PrefillConfig(tpa=0)


@pytest.mark.parametrize("name", ["prompts", "prompt", "output", "metrics", "cache.events"])
def test_a_world_that_prefills_refuses_what_the_document_says(name):
    role = TransferConfig(role="prefill", address="127.0.0.1:1")
    GenerateConfig(transfer=role)
    given = {"cache": CacheConfig(events="x")} if name == "cache.events" else {name: "x"}
    with pytest.raises(ValueError, match=f"{name} = x belongs to the decode group"):
        GenerateConfig(transfer=role, **given)
    assert f"`{name}=`" in DOCUMENT


def test_a_decode_group_that_is_gone_is_no_bad_input_of_the_prefill_group(monkeypatch):
    class Serving:
        def __init__(self, _):
            pass

        def serve(self):
            raise ConnectionError("the decode group is gone: it closed the connection")

    monkeypatch.setattr(scripts.generate, "LLM", Serving)
    config = GenerateConfig(transfer=TransferConfig(role="prefill", address="127.0.0.1:1"))
    with pytest.raises(ending.RunFailed, match="the decode group is gone"):
        run(config)


def test_a_world_that_decodes_needs_prompts():
    with pytest.raises(ValueError, match="give one of prompts"):
        GenerateConfig(transfer=TransferConfig(role="decode", address="127.0.0.1:1"))


def test_the_first_part_of_a_split_world_has_the_prefill_layout():
    config = GenerateConfig(prompt="x", transfer=TransferConfig(prefill_ranks=2, prefill=PrefillConfig(kvp=2, tpa=1)))
    config.parallel.kvp = 4
    config.speculative.method = "ngram"
    assert (config_of_part(config, 0).speculative.method, config_of_part(config, 1).speculative.method) == (
        "none",
        "ngram",
    )
    assert (config_of_part(config, 0).parallel.kvp, config_of_part(config, 1).parallel.kvp) == (2, 4)
    assert config.transfer.prefills(0) and not config.transfer.prefills(1)


def documented_commands():
    """What follows ``scripts.generate`` in each command of the document."""
    text = DOCUMENT.replace("\\\n", " ")
    return [line.split("scripts.generate")[1].split() for line in text.splitlines() if "-m scripts.generate" in line]


@pytest.mark.parametrize("arguments", documented_commands(), ids=" ".join)
def test_the_documents_commands_are_valid(arguments):
    cli.check("generate", GenerateConfig, arguments)


def test_the_documents_table_has_every_key_and_its_default():
    rows = dict(re.findall(r"^\| `transfer\.(\w+)` \| (\S+) \|", DOCUMENT, re.MULTILINE))
    defaults = {name: value for name, value in asdict(TransferConfig()).items() if name != "prefill"}
    assert rows == {
        name: f"{value:g}" if isinstance(value, float) else str(value).lower() for name, value in defaults.items()
    }
