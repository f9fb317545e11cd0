"""Checkpoints, settings, layouts and prompts that do not fit end the job in one line, before memory is taken."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import helix.building
import helix.llm
from parallel.launch import Launch
from tests.scripts.generate.job import SMALL, Command, refusal, torchrun, write_lines


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make taking memory for the model a failure."""

    def decoder(*_: Any, **__: Any) -> None:
        raise AssertionError("memory was taken for the model")

    monkeypatch.setattr(helix.building, "Decoder", decoder)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_index_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    weights = {name: f"model-0000{shard}-of-00002.safetensors" for shard, name in enumerate(("a", "b"), 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (shutil.rmtree, "model.path = {0} does not exist; give a checkpoint folder or a config.json file"),
        (unlink("config.json"), "model.path = {0} has no config.json; give a checkpoint folder or a config.json file"),
        (
            lambda folder: edit_config(folder, model_type="mamba"),
            "model.path = {0} has model_type 'mamba'; supported: deepseek_v2, deepseek_v3, gemma3, ",
        ),
        (
            unlink("model.safetensors"),
            "model.path = {0} has no weights: neither model.safetensors nor model.safetensors.index.json is there",
        ),
        (
            no_index_shard,
            "model.path = {0} lacks 1 of 2 files that model.safetensors.index.json names: model-00001-of",
        ),
        (
            truncate,
            "model.path = {0}/model.safetensors is truncated or not a safetensors file (Error while",
        ),
        (
            to_pickle,
            "model.path = {0} holds only pickle files (pytorch_model.bin), refused: Helix reads safetensors only",
        ),
        (
            lambda folder: edit_config(folder, num_hidden_layers=3),
            "model.path = {0} lacks 9 tensors of a llama model: model.layers.2",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "model.path = {0}: its tokenizer does not load: "),
    ],
    ids=[
        "no folder",
        "no config",
        "family",
        "no weights",
        "missing shard",
        "truncated",
        "pickle",
        "tensors",
        "tokenizer",
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_a_checkpoint_that_cannot_be_used_is_refused_in_one_line(
    broken: Path, command: Command, breaking: Callable[[Path], Any], message: str
) -> None:
    breaking(broken)
    assert refusal(command(f"model.path={broken}", "prompt=hi", *SMALL)).startswith(message.format(broken))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("parallel.kvp=2",), "parallel.kvp (2) x parallel.tpa (1) = 2 ranks but 1 started; lower one or start 2"),
        (("parallel.tpa=4",), "parallel.kvp (1) x parallel.tpa (4) = 4 ranks but 1 started; lower one or start 4"),
        (("parallel.tpf=2",), "parallel.tpf (2) x parallel.ep (1) must equal parallel.tpa (1) x parallel.kvp (1) = 1"),
        (("model.path=",), "model.path is empty: give a Hugging Face checkpoint folder"),
        (
            ("model.path=zai-org/glm-4",),
            "model.path = zai-org/glm-4 does not exist; give a checkpoint folder or a "
            "config.json file; names of a hub are not fetched: hf download zai-org/glm-4 --local-dir DIR",
        ),
        (("prompts=none.jsonl", "prompt=null"), "prompts = none.jsonl cannot be read: No such file or directory"),
        (("output=nowhere/out.jsonl",), "nowhere/out.jsonl cannot be written: {0}/nowhere is not a folder"),
        (("metrics=nowhere/m.json",), "nowhere/m.json cannot be written: {0}/nowhere is not a folder"),
        (("output=.",), ". cannot be written: it is a folder; name a file"),
        (("output=/proc/out.jsonl",), "/proc/out.jsonl cannot be written: No such file or directory"),
        (("cache.events=/proc/events.jsonl",), "/proc/events.jsonl cannot be written: No such file or directory"),
        (("output=a.json", "metrics=./a.json"), "{0}/a.json is named twice among prompts, output, metrics and"),
        (("prompts=in.jsonl", "prompt=null", "output=in.jsonl"), "{0}/in.jsonl is named twice among prompts, output"),
        (("cache.num_pages=2000000000",), "cache.num_pages = 2000000000 needs 32,768.0 GB of the "),
        (("cache.num_pages=100000000000",), "cache.num_pages = 100000000000 must be at most 2147483647"),
        (("runtime.device=cuda",), "runtime.device = cuda, but this node has "),
        (("attention.backend=triton",), "attention.backend = triton needs a CUDA device (or TRITON_INTERPRET=1)"),
        (
            ("attention.exchange=fused",),
            "attention.exchange = fused writes into other GPUs' memory, but the run is on cpu",
        ),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("no_memory")
def test_settings_that_do_not_fit_are_refused_in_one_line(
    model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = command(f"model.path={model}", "prompt=hi", *SMALL, *settings)
    assert refusal(ended).startswith(message.format(Path.cwd()))
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("world_size", "settings", "message"),
    [
        (
            16,
            ("parallel.kvp=2", "parallel.tpa=8"),
            "parallel.tpa = 8 exceeds the model's 4 KV heads while parallel.kvp = 2 > 1; "
            "lower tpa to at most 4 and give the ranks to kvp",
        ),
        (3, ("parallel.tpa=3",), "parallel.tpa = 3 must divide the model's 4 KV heads or be a multiple of them"),
        (4, ("parallel.kvp=8",), "parallel.kvp (8) x parallel.tpa (1) = 8 ranks but 4 started; lower one or start 8"),
        (4, ("parallel.kvp=2", "parallel.tpa=1"), "= 2 ranks but 4 started; raise one or start 2"),
        (16, ("parallel.kvp=16",), "= 16 ranks exceed the model's 8 query heads; lower one"),
        (4, ("parallel.ep=2",), "parallel.ep = 2, but llama models have no experts; use parallel.ep=1"),
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_a_layout_that_fits_neither_world_nor_model_is_refused_in_one_line(
    model: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    settings: tuple[str, ...],
    message: str,
) -> None:
    launch = Launch(world_size - 1, world_size, 0, world_size, torch.device("cpu"))
    monkeypatch.setattr(helix.llm, "start", lambda *_, **__: launch)
    assert message in refusal(command(f"model.path={model}", "prompt=hi", *SMALL, *settings))


def test_ranks_refuse_bad_input_once_and_with_code_2(model: Path, tmp_path: Path) -> None:
    ended = torchrun(2, f"model.path={model}", "prompt=hi", "parallel.kvp=4", folder=tmp_path)
    message = "error: parallel.kvp (4) x parallel.tpa (1) = 4 ranks but 2 started; lower one or start 4"
    told = [line for line in ended.stderr.splitlines() if "parallel.kvp" in line]
    assert told == [message, f"  traceback : {message}"], "ours, and the end of torchrun's summary"
    assert ended.stdout == ""
    assert ended.stderr.count("Traceback") == 1, "torchrun's own, which tells of the exit codes"
    first = ended.stderr.split("Root Cause (first observed failure)")[1]
    assert "rank      : 0 (local_rank: 0)" in first
    assert "exitcode  : 2 " in first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("parallel.kvp=1,2", "parallel.kvp (2) x parallel.tpa (1) = 2 ranks but 1 started; lower one or start 2"),
        ("model.path={0},gone", "model.path = gone does not exist; give a checkpoint folder or a config.json file"),
        ("output=out.jsonl,gone/out.jsonl", "gone/out.jsonl cannot be written: {1}/gone is not a folder"),
        (
            "sampling.max_tokens=1,2 prompts=in.jsonl prompt=null",
            "prompts = in.jsonl cannot be read: No such file or directory",
        ),
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_a_sweep_with_a_job_that_cannot_run_is_refused_before_the_first(
    model: Path, command: Command, sweep: str, message: str
) -> None:
    given = ("-m", f"model.path={model}", "prompt=hello", *SMALL)
    ended = command(*given, *sweep.format(model).split())
    assert refusal(ended) == message.format(model, Path.cwd())
    assert os.listdir() == []


@pytest.mark.slow
def test_ranks_refuse_a_sweep_with_a_layout_that_does_not_fit_and_run_none_of_it(model: Path, tmp_path: Path) -> None:
    settings = [f"model.path={model}", "prompt=hello", "output=${parallel.kvp}.jsonl", "parallel.tpa=1", *SMALL]
    ended = torchrun(2, "-m", *settings, "parallel.kvp=2,4", folder=tmp_path)
    message = "error: parallel.kvp (4) x parallel.tpa (1) = 4 ranks but 2 started; lower one or start 4"
    assert [line for line in ended.stderr.splitlines() if line.startswith(("error", "job "))] == [message]
    assert "exitcode  : 2 " in ended.stderr.split("Root Cause (first observed failure)")[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_memory")
def test_when_every_prompt_fails_the_code_is_2_before_any_model_memory_is_taken(model: Path, command: Command) -> None:
    write_lines(Path("in.jsonl"), {"prompt_token_ids": [320]}, "{")
    ended = command(f"model.path={model}", "prompts=in.jsonl", "output=out.jsonl", *SMALL)
    assert refusal(ended) == "all 2 prompts failed: token id 320 is outside the vocabulary of 320"
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": ""}, "the prompt is empty; give at least one token"),
        ({"prompt_token_ids": []}, "the prompt is empty; give at least one token"),
        ({"prompt_token_ids": [1] * 30}, "the prompt has 30 tokens; the model takes at most 29"),
        ({"prompt": "x" * 31}, "the prompt has 31 tokens; the model takes at most 29"),
        ({"prompt_token_ids": [5, 320]}, "token id 320 is outside the vocabulary of 320"),
        ({"prompt_token_ids": [-1]}, "token id -1 is outside the vocabulary of 320"),
        ('{"prompt": "a"', "in.jsonl, line 1: not JSON: Expecting ',' delimiter (column 15)"),
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_a_bad_prompt_is_refused_in_one_line(model: Path, command: Command, line: Any, message: str) -> None:
    write_lines(Path("in.jsonl"), line)
    assert refusal(command(f"model.path={model}", "prompts=in.jsonl", "model.max_position=30", *SMALL)) == message
