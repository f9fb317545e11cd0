r"""From key=value to the settings of a command: the types of its dataclasses decide how a value is read.

A text is what was given, whatever its characters, but for these:
    null                 nothing, where a setting may be left out
    '...' or "..."       the text between the quotes; in double quotes with JSON's escapes, so "\n" is a newline
    ~/...                in the user's home
    ${KEY}               the value of another key; \${ is ${ itself
A list is [ITEM,ITEM], or one item; items are read alike, but for the last two. ``prompt`` is text as it is, quotes too.
What maps keys to values is a JSON object, or Hydra's {KEY: VALUE}.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException

from helix.checks import whole_number

Config = TypeVar("Config")
Tree = dict[str, Any]
"""The values of a schema's keys; those of a group of keys are a tree of their own."""
RAW_KEY = "prompt"
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def defaults(schema: type[Any]) -> Tree:
    """Return the values that a schema's dataclasses give their fields."""
    tree: Tree = {}
    for field in fields(schema):
        if is_dataclass(field.default_factory):
            tree[field.name] = defaults(field.default_factory)
        else:
            tree[field.name] = field.default if field.default_factory is MISSING else field.default_factory()
    return tree


def type_of(schema: type[Any], key: str) -> Any:
    """Return the annotated type of a key, or the dataclass of a group of keys; Any for what lies in a dict.

    Raises:
        ValueError: for a key that there is not; it says which there are.
    """
    kind: Any = schema
    parts = key.split(".")
    for number, part in enumerate(parts):
        before = ".".join(parts[:number])
        if not is_dataclass(kind):
            if _bare(kind) is dict or get_origin(_bare(kind)) is dict:
                return Any
            raise ValueError(f"{key} is not a key: {before} is a value, not a group of keys")
        choices = [field.name for field in fields(kind)]
        if part not in choices:
            near = get_close_matches(part, choices, 1)
            hint = f" did you mean {'.'.join([*parts[:number], near[0]])}?" if near else ""
            where = f"{before} has" if before else "there are"
            raise ValueError(f"{key} is not a key;{hint} {where}: {', '.join(choices)}")
        kind = get_type_hints(kind)[part]
    return kind


def is_text(kind: Any) -> bool:
    """Return whether values of a type are text, or a list of texts."""
    return _bare(kind) in (str, list[str])


def put(tree: Tree, key: str, value: Any) -> None:
    """Set the value of a key that the tree's schema has."""
    *groups, last = key.split(".")
    for group in groups:
        tree[group] = dict(tree[group] or {})
        tree = tree[group]
    tree[last] = value


def get(tree: Any, key: str) -> Any:
    """Return the value of a key; None where there is no such key."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def overlay(tree: Tree, schema: type[Any], values: dict[Any, Any], group: str = "") -> None:
    """Put what a YAML file composes to into a tree; ValueError for keys and types that the schema has not."""
    for name, value in values.items():
        key = f"{group}{name}"
        kind = type_of(schema, key)
        if is_dataclass(kind) and isinstance(value, dict):
            overlay(tree, schema, value, f"{key}.")
        else:
            put(tree, key, _conform(key, value, kind))


def read(key: str, text: str, kind: Any) -> Any:
    """Return the value that a text stands for, of a key's type; ValueError, in one line, where it has another."""
    if is_dataclass(kind):
        choices = ", ".join(f"{key}.{field.name}" for field in fields(kind))
        raise ValueError(f"{key} = {_short(text)} is a group of keys and no value; set one of {choices}")
    if text == "null" and kind is not _bare(kind):
        return None
    bare = _bare(kind)
    if key == RAW_KEY:
        return text
    if bare is str:
        return unquote(key, text)
    if get_origin(bare) is list:
        return [_item(key, item, get_args(bare)[0]) for item in list_items(text)]
    if bare in (bool, int, float):
        return _conform(key, _scalar(text.strip(), bare), kind)
    if (mapping := json_object(text)) is not None:
        return mapping
    try:
        value = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text
    return text if isinstance(value, Sweep) else value


def json_object(text: str) -> dict[str, Any] | None:
    """Return what a text is as a JSON object; None where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def list_items(text: str) -> list[str]:
    """Return the items of a list, [ITEM,ITEM], as they are written; a text that is no list is the only item."""
    text = text.strip()
    return split(text[1:-1]) if text.startswith("[") and text.endswith("]") else [text]


def split(text: str) -> list[str]:
    """Split a text at the commas that stand neither in quotes around an item nor in brackets."""
    items, item, depth, quote = list[str](), "", 0, ""
    escaped = False
    for char in text:
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "'\"" and not item.strip(" [{"):
            quote, escaped = char, False
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth = max(depth - 1, 0)
        if char == "," and not depth and not quote:
            items.append(item.strip())
            item = ""
        else:
            item += char
    return [*items, item.strip()] if items or item.strip() else []


def unquote(key: str, text: str) -> str:
    """Return a text without the quotes around all of it, if there are any."""
    if re.fullmatch(r"'([^'\\]|\\.)*'", text, re.DOTALL):
        return text[1:-1].replace("\\'", "'")
    if re.fullmatch(r'"([^"\\]|\\.)*"', text, re.DOTALL):
        try:
            return str(json.loads(text, strict=False))
        except ValueError as error:
            raise ValueError(
                f"{key} = {_short(text)} has an escape that is none of JSON's; write \\\\ for a backslash, or use "
                "single quotes"
            ) from error
    return text


def resolve(tree: Tree, schema: type[Any]) -> None:
    """Put the values of other keys, and the user's home, into the texts of a tree that name them."""
    for key in list(_keys(schema)):
        text = get(tree, key)
        if isinstance(text, str) and key != RAW_KEY and _bare(type_of(schema, key)) is str:
            put(tree, key, _resolved(tree, schema, key, text))


def build(schema: type[Config], tree: Tree) -> Config:
    """Return the settings; ValueError, from their own checks, says in one line why they cannot be."""
    values = {
        field.name: build(field.default_factory, tree[field.name])
        if is_dataclass(field.default_factory)
        else tree[field.name]
        for field in fields(schema)
    }
    return schema(**values)


def _resolved(tree: Tree, schema: type[Any], key: str, text: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[0].startswith("\\"):
            return "${"
        try:
            named = type_of(schema, match[1])
        except ValueError as error:
            raise ValueError(f"{key} = {_short(text)}: {error}; write \\${{ for ${{ itself") from error
        if is_dataclass(named):
            raise ValueError(f"{key} = {_short(text)}: {match[1]} is a group of keys; name one of them")
        found = get(tree, match[1])
        return found if isinstance(found, str) else json.dumps(found)

    text = re.sub(r"\\\$\{|\$\{([\w.]+)\}", value, text)
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _keys(schema: type[Any], group: str = "") -> Iterator[str]:
    for field in fields(schema):
        if is_dataclass(field.default_factory):
            yield from _keys(field.default_factory, f"{group}{field.name}.")
        else:
            yield group + field.name


def _item(key: str, text: str, kind: Any) -> Any:
    if kind is str:
        return unquote(key, text)
    if get_origin(kind) is list:
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError(f"{key} has {_short(text)} where a list in brackets must be")
        return [_item(key, item, get_args(kind)[0]) for item in list_items(text)]
    return _conform(key, _scalar(text, kind), kind)


def _scalar(text: str, kind: type[Any]) -> Any:
    """Return the value of a scalar's text; the text itself where it is none of its type."""
    if kind is bool:
        return _BOOLS.get(text.lower(), text)
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _conform(key: str, value: Any, kind: Any) -> Any:
    """Return a value in a key's type where it is certain what is meant, as 4.0 for 4."""
    if is_dataclass(kind):
        return read(key, str(value), kind)  # a value where a group of keys must be
    bare = _bare(kind)
    if bare is Any or (value is None and bare is not kind):
        return value
    if get_origin(bare) is list and isinstance(value, list):
        return [_conform(key, item, get_args(bare)[0]) for item in value]
    if get_origin(bare) is dict and isinstance(value, dict):
        return value
    if bare is int:
        value = whole_number(value)
    if bare is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(value) is not bare:
        expected = _NAMES.get(bare, "a list" if get_origin(bare) is list else "a mapping")
        raise ValueError(f"{key} = {_short(value)} must be {expected}" + " or null" * (bare is not kind))
    return value


def _bare(kind: Any) -> Any:
    """Return the type of a value that is not null."""
    if isinstance(kind, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    return kind


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
