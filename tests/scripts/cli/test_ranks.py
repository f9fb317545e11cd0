"""A command on ranks: rank 0 alone speaks, and a rank that fails ends all."""

from pathlib import Path
from typing import Any

import pytest

from scripts import cli, ending
from tests.scripts.cli.line import GIVEN, Command, one_line, raising, torchrun


def test_every_rank_runs_the_command(command: Command) -> None:
    assert command(*GIVEN, rank=0).ran == command(*GIVEN, rank=3).ran != []


@pytest.mark.parametrize("error", [ValueError("tpa = 3:\n  too\tmany"), OSError("tpa = 3: too many")])
def test_a_refusal_of_the_command_itself_is_one_line_and_code_2(command: Command, error: Exception) -> None:
    assert one_line(command(*GIVEN, body=raising(error))) == "tpa = 3: too many"


def test_other_ranks_wait_for_rank_0_to_speak(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(ending, "_GRACE_S", 20.0)
    monkeypatch.setattr(ending.time, "sleep", waited.append)
    assert command(*GIVEN, "zzz=1", rank=1).code == 2
    assert waited == [20.0]
    assert command(*GIVEN, "zzz=1", rank=0).code == 2
    assert waited == [20.0]


def test_a_rank_that_is_alone_with_its_problem_speaks_in_the_end(command: Command) -> None:
    ended = command(*GIVEN, rank=1, body=raising(ValueError("only here")))
    assert (ended.code, ended.err) == (2, "error on rank 1: only here\n")


def test_a_fault_is_not_taken_for_bad_input(command: Command) -> None:
    ended = command(*GIVEN, body=raising(ZeroDivisionError("a fault")))
    assert ended.code == 1
    assert ended.err.startswith("Traceback (most recent call last):\n")
    assert ended.err.endswith("\nZeroDivisionError: a fault\n")


def test_a_run_that_failed_is_neither_bad_input_nor_a_defect(command: Command) -> None:
    ended = command(*GIVEN, body=raising(ending.RunFailed("the disk\nis full")))
    assert (ended.code, ended.err) == (1, "error: the disk is full\n")


def test_a_fault_on_any_rank_is_told_whole_and_not_in_hydras_words(command: Command) -> None:
    def body(_: Any) -> None:
        try:
            raise KeyError("the cause")
        except KeyError as cause:
            raise RuntimeError("a fault") from cause

    ended = command(*GIVEN, rank=1, body=body)
    assert ended.code == 1
    assert ended.err.startswith("rank 1 failed\nTraceback (most recent call last):\n")
    assert "KeyError: 'the cause'" in ended.err
    assert ended.err.endswith("\nRuntimeError: a fault\n")


FAILING = """
from parallel.launch import gather_values, start
from scripts import cli
from scripts.generate import GenerateConfig

def run(config):
    if start("cpu").rank == 1:
        raise RuntimeError("the cause")
    gather_values(0)

cli.main("generate", GenerateConfig, run)
"""


def test_a_rank_that_fails_alone_ends_all_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    ended = torchrun(2, "failing.py", *GIVEN, folder=tmp_path)
    assert ended.returncode == 1
    assert "rank 1 failed\nTraceback" in ended.stderr
    assert "RuntimeError: the cause" in ended.stderr
    cause = ended.stderr.split("Root Cause (first observed failure)")[1]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "exitcode  : 1 " in cause
    for words in ("Error executing job", "HYDRA_FULL_ERROR"):
        assert words not in ended.stderr


def test_only_rank_0_says_anything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    cli.say("alone")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        cli.say(f"rank {rank}")
    assert capsys.readouterr().out == "alone\nrank 0\n"
