"""A checkpoint, a copy of it to break, and the job in this process."""

import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import cli
from scripts.generate import GenerateConfig, plan, run
from scripts.make_checkpoint import make_checkpoint
from tests.scripts.generate.job import Command, Ended


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint for a test to break."""
    return shutil.copytree(model, tmp_path / "broken")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """Give the command in this process, a world of one, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        code = None
        try:
            cli.main("generate", GenerateConfig, run, plan=plan)
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr())

    yield call
    root.handlers, root.level = handlers, level
