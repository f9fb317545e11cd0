"""``generate``'s command line in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import cli, ending
from scripts.generate import GenerateConfig
from tests.scripts.cli.line import Command, Ended


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Give ``generate``'s command line in this process, in an empty folder, with a body that only notes its config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ending, "_GRACE_S", 0.0)
    monkeypatch.setenv("COLUMNS", "200")

    def run(
        *arguments: str,
        rank: int | None = None,
        body: Callable[[Any], None] | None = None,
        plan: Callable[[Any], None] | None = None,
    ) -> Ended:
        configs: list[GenerateConfig] = []

        def note(config: GenerateConfig) -> None:
            configs.append(config)

        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        if rank is not None:
            monkeypatch.setenv("RANK", str(rank))
        code = None
        try:
            cli.main("generate", GenerateConfig, body or note, plan=plan)
        except SystemExit as end:
            code = end.code
        return Ended(configs, code, *capsys.readouterr())

    return run
