"""The arrows between the rooms, and what each room may use, read from the source without importing it."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("parallel", "attention", "helix", "scripts")  # each may import those before it, and itself
OTHERS = ("tests", "conf")  # nothing of the rooms imports these
CONTROL_PLANE = ("parallel/placement.py", "parallel/layout.py", "helix/cache/*.py")
DATA_PLANE = ("pages.py", "mover.py")
SCRIPTS_ONLY = re.compile(r"(hydra|omegaconf|sys\.exit|os\._exit|SystemExit)\b")
CALLS = ("print", "exit", "quit")
Check = Callable[[Path], list[str]]  # what breaks it in the checkout at this path, one line each


def sources(root: Path, room: str) -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted((root / room).rglob("*.py")):
        yield file, ast.parse(file.read_text("utf-8"), str(file))


def imported(root: Path, file: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and full name of all that a file imports, in its functions too; ``from a import b`` gives ``a.b``."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_arrows(root: Path) -> list[str]:
    wrong = []
    for place, room in enumerate(ROOMS):
        for file, tree in sources(root, room):
            for line, name in imported(root, file, tree):
                if name.split(".")[0] in (*ROOMS[place + 1 :], *OTHERS):
                    wrong.append(f"{file.relative_to(root)}:{line} imports {name}")
    return wrong


def file_of(root: Path, name: str) -> Path | None:
    """The checkout's file that holds a module, or a name in a module."""
    for parts in (name.split("."), name.split(".")[:-1]):
        module = root.joinpath(*parts)
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if parts and file.is_file():
                return file
    return None


def torch_in_the_control_plane(root: Path) -> list[str]:
    """Imports of torch, also through another file of the checkout; the packages on the way do not count."""
    files = [file for pattern in CONTROL_PLANE for file in sorted(root.glob(pattern)) if file.name not in DATA_PLANE]
    wrong = []
    for start in files:
        reached, seen = [start], {start}
        for file in reached:
            for line, name in imported(root, file, ast.parse(file.read_text("utf-8"))):
                if name.split(".")[0] == "torch":
                    wrong.append(f"{start.relative_to(root)} reaches torch in {file.relative_to(root)}:{line}")
                if (next_file := file_of(root, name)) and next_file not in seen:
                    seen.add(next_file)
                    reached.append(next_file)
    return wrong


def used_outside_scripts(root: Path) -> list[str]:
    """Uses of hydra, print and the interpreter's exit in the rooms that are libraries."""
    wrong = []
    for room in ROOMS[:-1]:
        for file, tree in sources(root, room):
            uses = [(line, name) for line, name in imported(root, file, tree) if SCRIPTS_ONLY.match(name)]
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
                    uses.append((node.lineno, node.func.id))
                elif isinstance(node, (ast.Attribute, ast.Name)) and SCRIPTS_ONLY.match(ast.unparse(node)):
                    uses.append((node.lineno, ast.unparse(node)))
            wrong += [f"{file.relative_to(root)}:{line} uses {name}" for line, name in uses]
    return wrong


def test_a_room_imports_only_rooms_below_it() -> None:
    assert wrong_arrows(ROOT) == []


def test_the_control_plane_reaches_no_torch() -> None:
    assert torch_in_the_control_plane(ROOT) == []


def test_the_http_process_starts_without_torch() -> None:
    pytest.importorskip("uvicorn")
    code = "import sys; sys.modules['torch'] = None; import helix.serving.process"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_only_scripts_use_hydra_print_and_exit() -> None:
    assert used_outside_scripts(ROOT) == []


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_the_checkouts_own(room: str) -> None:
    spec = importlib.util.find_spec(room)
    assert spec is not None
    assert {Path(folder).resolve() for folder in spec.submodule_search_locations or []} == {ROOT / room}
    assert list((ROOT / room).rglob("*.py")), f"{room} holds no Python"


ARROWS, TORCH, USES = wrong_arrows, torch_in_the_control_plane, used_outside_scripts


@pytest.mark.parametrize(
    ("check", "file", "source", "complaint"),
    [
        (ARROWS, "parallel/grid.py", "import attention.merge", "grid.py:1 imports attention.merge"),
        (ARROWS, "attention/partial.py", "def f():\n    from helix import llm", "partial.py:2 imports helix.llm"),
        (ARROWS, "helix/models/glm.py", "from scripts.plot import x", "glm.py:1 imports scripts.plot.x"),
        (ARROWS, "helix/llm.py", "from tests.ranks import RankPool", "llm.py:1 imports tests.ranks.RankPool"),
        (TORCH, "parallel/placement.py", "import torch.nn", "reaches torch in parallel/placement.py:1"),
        (TORCH, "helix/cache/tree.py", "from ..llm import LLM", "reaches torch in helix/llm.py:1"),
        (TORCH, "helix/cache/tree.py", "from . import pages", "reaches torch in helix/cache/pages.py:1"),
        (USES, "helix/engine.py", "print('hello')", "engine.py:1 uses print"),
        (USES, "parallel/launch.py", "import sys\nsys.exit(2)", "launch.py:2 uses sys.exit"),
        (USES, "parallel/launch.py", "from sys import exit as leave", "launch.py:1 uses sys.exit"),
        (USES, "parallel/launch.py", "raise SystemExit(2)", "launch.py:1 uses SystemExit"),
        (USES, "helix/cache/tree.py", "import hydra.utils as u", "tree.py:1 uses hydra.utils"),
    ],
)
def test_each_check_names_what_breaks_it(tmp_path: Path, check: Check, file: str, source: str, complaint: str) -> None:
    for name, text in {"helix/llm.py": "import torch", "helix/cache/pages.py": "import torch", file: source}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    [found] = check(tmp_path)
    assert found.endswith(complaint)


def test_what_the_rooms_are_for_breaks_no_check(tmp_path: Path) -> None:
    files = {
        "parallel/placement.py": "import numpy",
        "helix/cache/tree.py": "from parallel.placement import BlockCyclic\nfrom . import tree",
        "helix/cache/pages.py": "import torch\nfrom attention.append import append",
        "scripts/generate.py": "import sys, hydra\nfrom helix.llm import LLM\nprint(1)\nsys.exit(2)",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert wrong_arrows(tmp_path) + torch_in_the_control_plane(tmp_path) + used_outside_scripts(tmp_path) == []
