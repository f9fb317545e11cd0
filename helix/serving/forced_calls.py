"""Makes an answer one tool call, as tool_choice asks for it: the form that the model's response template reads.

The template says what a call begins and ends with, and where its name and its arguments stand in the JSON between. That
is read from it where it is simple enough, and tried: its parser has to find the call in a sample.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ..structured import require_depth
from .parsing import TOOL_CALL, AnswerParser

_ESCAPED = re.compile(r"\\([^\w\s])")
_VALUES = ("const", "enum", "default", "examples")  # of a schema, what holds no schemas
_SPECIAL = re.compile(r"[\\^$.|?*+()\[\]{}]")


def names_of(choice: Any, tools: Sequence[dict[str, Any]]) -> list[str]:
    """Return the functions of which one has to be called; none where that is the model's to decide.

    Raises:
        ValueError: in one line, for a choice that is none, or of a function that is not there.
    """
    if choice in ("auto", "none"):
        return []
    names = [name for tool in tools if isinstance(name := _function(tool).get("name"), str) and name]
    if len(names) < len(tools):
        raise ValueError("tools must each have function.name, a text, where one of them has to be called")
    if choice == "required":
        if not names:
            raise ValueError('tool_choice = "required" needs tools')
        return names
    name = _function(choice).get("name") if isinstance(choice, dict) else None
    if name is None or choice.get("type") != "function":
        raise ValueError('tool_choice must be none, auto, required or {"type": "function", "function": {"name": ...}}')
    if name not in names:
        raise ValueError(f"tool_choice = {str(name)[:100]!r} is none of tools")
    return [name]


def forced_call(template: Any, prompt: str, tools: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """Return the ``structured_outputs`` of an answer that is one call of one of some functions.

    Args:
        template: the response template.
        prompt: what the answer follows.

    Raises:
        ValueError: in one line, where the template reads no such call behind the prompt.
    """
    begin, name_key, arguments_key, end = _form(template)
    sample = json.dumps({name_key: names[0], arguments_key: {}})
    parts = AnswerParser(template, prompt, tools).push(begin + sample + end, ends=True)
    if [part.name for part in parts if part.kind == TOOL_CALL] != [names[0]] or any(
        part.text.strip() for part in parts if part.kind != TOOL_CALL
    ):
        raise ValueError("tool_choice is not supported here: the model's response template reads no call at its place")
    schemas = list[dict[str, Any]]()
    for tool in tools:
        function = _function(tool)
        if function.get("name") in names:
            root = f"#/anyOf/{len(schemas)}/properties/{_pointer(arguments_key)}"
            parameters = function.get("parameters") or {"type": "object"}
            require_depth(parameters, "tools")
            arguments = _moved(parameters, root)
            properties = {name_key: {"const": function["name"]}, arguments_key: arguments}
            schemas.append({
                "type": "object", "properties": properties, "required": [name_key, arguments_key],
                "additionalProperties": False,
            })  # fmt: skip
    return {"call": json.dumps({"begin": begin, "schema": {"anyOf": schemas}, "end": end}, ensure_ascii=False)}


def _form(template: Any) -> tuple[str, str, str, str]:
    """Return what a call begins with, the keys of its name and its arguments, and what it ends with."""
    field = template.fields.get("tool_calls")
    if field is None or field.content != "json" or field.content_args or field.transform_each:
        raise ValueError("tool_choice is not supported here: calls of the model's response template are not plain JSON")
    begin = field.open_literals[0] if field.open_literals else _literal(field.open_re)
    end = field.close_literals[0] if field.close_literals else _literal(field.close_re) if field.close_re else ""
    function = field.transform.get("function") if isinstance(field.transform, dict) else None
    keys = ("name", "arguments")
    if isinstance(function, dict):
        keys = tuple(_key(function.get(key)) for key in keys)  # type: ignore[assignment]
    elif function != "{content}":
        raise ValueError("tool_choice is not supported here: the model's response template does not show a call's name")
    return begin, *keys, end


def _key(placeholder: Any) -> str:
    found = re.fullmatch(r"\{content\.(\w+)\}", str(placeholder))
    if found is None:
        raise ValueError("tool_choice is not supported here: the model's response template does not show a call's name")
    return found[1]


def _literal(pattern: Any) -> str:
    """Return the text that a pattern stands for, where it is one, but for blanks before and behind."""
    bare = re.sub(r"^(\\s[*+]?)+|(\\s[*+]?)+$", "", pattern.pattern)
    plain = _ESCAPED.sub("", bare)
    if not bare or _SPECIAL.search(plain):
        raise ValueError("tool_choice is not supported here: the model's response template finds calls by a pattern")
    return _ESCAPED.sub(r"\1", bare)


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, dict) else {}


def _moved(schema: Any, root: str) -> Any:
    """Return a schema whose references to itself are right where it stands below another."""
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: value if key in _VALUES else _moved(value, root) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = root + reference[1:]
    return moved


def _pointer(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
