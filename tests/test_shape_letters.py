"""Letters that name a tensor's axes are those of docs/design.md, or their file says what they are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("parallel", "attention", "helix")
SHAPE = re.compile(r"\[([A-Za-z0-9_'/*+, ]+)\]")
LETTER = re.compile(r"\b[A-Z]\b")


def house() -> set[str]:
    """The letters of the table's first column."""
    table = (ROOT / "docs" / "design.md").read_text("utf-8").split("## Shape letters\n")[1]
    return {letter for row in re.findall(r"^\| ([A-Za-z, ]+) \|", table, re.M) for letter in LETTER.findall(row)}


def unknown(source: str, known: set[str]) -> Iterator[str]:
    """The letters of shapes in a file's docstrings that neither the house nor the file's first docstring explains."""
    tree = ast.parse(source)
    own = (ast.get_docstring(tree) or "").partition("Shape letters")[2]
    known = known | set(LETTER.findall(own))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for shape in SHAPE.findall(ast.get_docstring(node) or ""):
                yield from (letter for letter in LETTER.findall(shape) if letter not in known)


def test_every_shape_letter_is_explained() -> None:
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    found = [(str(file.relative_to(ROOT)), *unknown(file.read_text("utf-8"), house())) for file in files]
    assert [file for file in found if len(file) > 1] == []


def test_a_letter_that_nobody_explains_is_found() -> None:
    assert list(unknown('"""Rows [R, X] of a file.\n\nShape letters: Y years.\n"""', house())) == ["X"]
    assert list(unknown('"""Rows [R, Y].\n\nShape letters: Y years.\n"""', house())) == []
