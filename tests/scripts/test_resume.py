"""Which lines of an output file are done, and which file is none that a run goes on with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helix.config import HelixConfig, ModelConfig
from helix.request import Request
from helix.sampling import SamplingParams
from scripts.generate import GenerateConfig, read_input
from scripts.make_checkpoint import make_checkpoint
from scripts.resume import done_lines, hashes_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("resume") / "model")


def line(name: str, number: str, **more: Any) -> str:
    return json.dumps({"id": name, "text": "\u2028ä"} | ({"hash": number} if "error" not in more else {}) | more)


def write(file: Path, *lines: str, end: str = "\n") -> str:
    file.write_text("\n".join(lines) + end, "utf-8")
    return str(file)


NAMES, HASHES = ["x", "y", "z"], ["1", "2", "3"]


def test_lines_in_any_order_are_done_and_failed_or_cut_ones_are_not(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    z, x = line("z", "3"), line("x", "1")
    path = write(file, z, line("y", "2", error="lost"), "", x, line("y", "2")[:-5], end="")
    assert done_lines(path, NAMES, HASHES, resume=True) == {2: z, 0: x}
    assert done_lines(str(tmp_path / "none.jsonl"), NAMES, HASHES, resume=True) == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line("x", "9"), 'line 2, is of id "x" of another prompt, other settings or another model; name another'),
        (line("w", "1"), 'line 2, is of id "w", which no prompt has; name another output, or remove it'),
        (json.dumps({"id": "x", "text": "of a version without hashes"}), 'line 2, is of id "x" of another prompt'),
        ('{"id": "x", ', "line 2, is no line of an output; name another output, or remove it"),
        ("[1]", "line 2, is no line of an output"),
    ],
)
def test_a_file_of_another_run_is_refused_and_without_resume_written_over(
    tmp_path: Path, bad: str, message: str
) -> None:
    path = write(tmp_path / "out.jsonl", line("z", "3", error="lost"), bad)
    with pytest.raises(ValueError) as refused:
        done_lines(path, NAMES, HASHES, resume=True)
    assert str(refused.value).startswith(f"resume = true, but output = {path}, ")
    assert message in str(refused.value)
    assert done_lines(path, NAMES, HASHES, resume=False) == {}


def test_a_file_that_this_run_began_is_not_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "out.jsonl", line("z", "3"), line("x", "1"))
    with pytest.raises(ValueError, match="holds 2 of this run's 3 lines; resume=true goes on with the others"):
        done_lines(path, NAMES, HASHES, resume=False)
    assert done_lines(path, ["x", "z"], ["1", "3"], resume=False) == {}, "a run that was done may be done again"


def test_what_becomes_of_a_file_that_is_there_is_logged(tmp_path: Path, model: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "out.jsonl"
    config = GenerateConfig(model=ModelConfig(path=str(model)), prompt="x", output=str(path))
    read_input(config)
    path.write_text("")
    read_input(config)
    assert not caplog.messages
    asked = hashes_of([Request(prompt="x")], config)[0]
    write(path, line("0", asked))
    assert read_input(config)[0].indices == [0]
    assert read_input(replace(config, resume=True))[0].indices == []
    assert caplog.messages == [
        f"output = {path} is there already and is replaced; resume=true keeps lines that are done",
        f"output = {path} has 1 of 1 lines, which are kept",
    ]


def edit(name: str, old: bytes, new: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))


def flip_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:4096] + bytes(byte ^ 1 for byte in content[4096:]))


@pytest.mark.parametrize(
    "change",
    [
        flip_weights,
        edit("config.json", b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05'),
        edit("tokenizer_config.json", b"}", b" }"),
    ],
    ids=["weights", "config", "tokenizer"],
)
def test_the_hash_is_of_the_model_wherever_it_lies(model: Path, tmp_path: Path, change: Callable[[Path], Any]) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    ask = [Request(prompt="hi")]
    hashes = [hashes_of(ask, HelixConfig(model=ModelConfig(path=str(path)))) for path in (model, moved)]
    assert hashes[0] == hashes[1]
    change(moved)
    assert hashes_of(ask, HelixConfig(model=ModelConfig(path=str(moved)))) != hashes[0]


def test_the_hash_is_of_the_prompt_and_its_settings_and_of_nothing_else(model: Path) -> None:
    config = HelixConfig(model=ModelConfig(path=str(model)))
    same = [
        Request(prompt="hi"),
        Request(prompt="hi", id="7", cache_salt="s"),
        Request(prompt="hi", sampling=SamplingParams()),
    ]
    other = [
        Request(prompt="hi "),
        Request(prompt="hi", sampling=SamplingParams(seed=1)),
        Request(messages=[{"role": "user", "content": "hi"}]),
        Request(prompt_token_ids=[1]),
        Request(prompt_token_ids=[2]),
    ]
    assert len(set(hashes_of(same, config))) == 1
    assert len(set(hashes_of([same[0], *other], config))) == 1 + len(other)
