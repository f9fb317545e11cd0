"""The flags of a command."""

import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

from scripts import cli, key_help
from tests.scripts.cli.line import GIVEN, Command, raising


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--help",), "sampling.max_tokens=16"),
        (("--cfg", "job"), "max_tokens: 16"),
    ],
)
def test_flags_that_print_do_so_on_rank_0_and_run_nothing(command: Command, flags: tuple[str, ...], text: str) -> None:
    spoken = command(*GIVEN, *flags, rank=0)
    assert (spoken.ran, spoken.err) == ([], "")
    assert spoken.out.count(text) == 1
    silent = command(*GIVEN, *flags, rank=1)
    assert (silent.ran, silent.code, silent.out, silent.err) == ([], None, "", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cfg", "job", *GIVEN, "sampling.max_tokens=3"),
        (*GIVEN, "--cfg", "job", "sampling.max_tokens=3"),
        (GIVEN[0], "-c", "job", GIVEN[1], "sampling.max_tokens=3"),
        (GIVEN[0], "-m", GIVEN[1], "--cfg=job", "sampling.max_tokens=3"),
    ],
    ids=" ".join,
)
def test_flags_may_stand_anywhere(command: Command, arguments: tuple[str, ...]) -> None:
    ended = command(*arguments)
    assert (ended.ran, ended.code, ended.err) == ([], None, "")
    assert ended.out.count("max_tokens: 3\n") == 1


@pytest.mark.parametrize("name", sorted(file.stem for file in cli.CONF.glob("*.yaml")))
def test_help_says_what_a_command_does_and_what_each_key_means(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"scripts.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "500")  # no line is folded
    schema = get_type_hints(module.run)["config"]
    cli.main(name, schema, module.run)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}: {module.__doc__.splitlines()[0]}\n")
    lines = [line.strip() for line in shown.splitlines()]
    for key, meaning in key_help.meanings(schema):
        assert meaning, f"{key} has no line under Attributes in the docstring of its dataclass"
        assert any(line.startswith((f"{key}=", f"{key}: ")) and line.endswith(meaning) for line in lines), key
    group = ""
    for line in shown.partition("what they mean:\n")[2].partition("\n\n")[0].splitlines():
        if not line.startswith(" "):
            group = line.partition(":")[0]
        else:
            assert line.strip().partition("=")[0].rpartition(".")[0] == group, f"{line} is below {group}"


def test_a_run_leaves_no_folder_and_no_log(command: Command, tmp_path: Path) -> None:
    assert len(command(*GIVEN).ran) == 1
    assert command(*GIVEN, "--cfg", "job").code is None
    assert command(*GIVEN, body=raising(ValueError("bad"))).code == 2
    assert list(tmp_path.iterdir()) == []
