"""What --help says of a command: its presets and every key, with its value and, in a line, what the key means.

The lines are those of the settings' own docstrings ("Attributes:"), so that a key is explained where it is defined.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from scripts.settings import Tree, get

KEY_WIDTH = 40
ENDING = (
    "--cfg job shows the keys as YAML, --multirun runs lists of values (key=1,2), --config-dir DIR has more presets."
)


def help_text(header: str, schema: type[Any], tree: Tree, presets: dict[str, list[str]]) -> str:
    """Return the help of a command whose keys have the values that were composed."""
    groups = [name for name in presets if name in tree]
    lines = [header, ""]
    if groups:
        lines += ["Presets (group=preset):", *(f"  {name}: {', '.join(presets[name])}" for name in groups), ""]
    lines.append("Keys, as they stand, and what they mean:")
    width = shutil.get_terminal_size((160, 50)).columns
    for key, meaning in meanings(schema):
        if key in groups_of(schema):
            lines.append(f"{key}: {meaning}")
            continue
        given = f"  {key}={_as_typed(get(tree, key))}"
        gap = " " * max(KEY_WIDTH - len(given), 2)
        lines += textwrap.wrap(
            given + gap + meaning,
            max(width, KEY_WIDTH + 40),
            subsequent_indent=" " * (KEY_WIDTH + 2),
            drop_whitespace=True,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join([*lines, "", ENDING])


def meanings(schema: type[Any], group: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key of a schema with what it means: its own first, then each group and the keys of the group."""
    said = _attributes(schema)
    for each in sorted(fields(schema), key=lambda each: is_dataclass(each.default_factory)):
        if is_dataclass(each.default_factory):
            yield group + each.name, _summary(each.default_factory)
            yield from meanings(each.default_factory, f"{group}{each.name}.")  # type: ignore[arg-type]
        else:
            yield group + each.name, said.get(each.name, "")


def groups_of(schema: type[Any], group: str = "") -> Iterator[str]:
    """Yield the keys that are groups of keys."""
    for each in fields(schema):
        if is_dataclass(each.default_factory):
            yield group + each.name
            yield from groups_of(each.default_factory, f"{group}{each.name}.")  # type: ignore[arg-type]


def _attributes(schema: type[Any]) -> dict[str, str]:
    """Return what the docstrings of a schema and of those that it extends say of each attribute, in one line."""
    said: dict[str, str] = {}
    for each in reversed(schema.__mro__):
        _, _, listed = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("Attributes:\n")
        listed = re.split(r"\n\n", listed)[0]
        for name, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n     +.*)*)", listed, re.MULTILINE):
            line = re.sub(r"\bNone\b", "null", " ".join(text.split()).replace("``", ""))
            said |= dict.fromkeys(name.split(", "), line)
    return said


def _summary(schema: type[Any]) -> str:
    return inspect.cleandoc(schema.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "")


def _as_typed(value: Any) -> str:
    """Return a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "''" if value == "" else str(value)
