"""The environment of a checkout: one that .venv only leads to is somebody else's, and stays as it is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "env.sh"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv leads to a folder beside it, in which one file is."""
    (tmp_path / "checkout" / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "checkout" / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / "checkout" / name).write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").write_text("")
    (tmp_path / "checkout" / ".venv").symlink_to(tmp_path / "other")
    return tmp_path / "checkout"


def source(checkout: Path) -> subprocess.CompletedProcess[str]:
    line = ["bash", "-c", "source scripts/env.sh && command -v python"]
    return subprocess.run(line, cwd=checkout, capture_output=True, text=True, timeout=60, check=False)


def test_an_environment_that_is_linked_to_is_activated_and_left_alone(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir()
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    ended = source(checkout)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.strip() == str(checkout / ".venv" / "bin" / "python")
    assert sorted(each.name for each in (checkout.parent / "other").iterdir()) == ["bin", "kept"]


def test_a_link_that_leads_to_no_environment_is_refused(checkout: Path) -> None:
    ended = source(checkout)
    assert ended.returncode == 2
    assert ended.stderr == f".venv leads to {checkout.parent / 'other'}, where no environment is: remove the link\n"
    assert (checkout.parent / "other" / "kept").exists()
