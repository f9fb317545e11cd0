"""Chat turns as clients write them, in the form that chat templates expect: texts, and arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

TEXT_TYPES = ("text", "input_text", "output_text")


def plain_messages(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return the turns with one text as each content, and with the arguments of tool calls as objects.

    Content in parts becomes their texts, a newline between them. Null content becomes an empty text, which no template
    prints as "None"; it stays null beside tool calls where the template asks whether it is.

    Args:
        messages: turns {"role", "content", ...}; other fields stay as they are, but for those that are null.
        template: the chat template's source.

    Raises:
        ValueError: in one line that names the turn: it has no role or content, a part that is no
            text, or arguments that are no JSON object.
    """
    return [_turn(turn, f"messages[{number}]", template) for number, turn in enumerate(messages)]


def _turn(turn: Mapping[str, Any], where: str, template: str) -> dict[str, Any]:
    if not (isinstance(turn, Mapping) and isinstance(turn.get("role"), str)):
        raise ValueError(f'{where} must be an object {{"role": ..., "content": ...}}')
    plain = {key: value for key, value in turn.items() if value is not None}
    if "content" not in turn and "tool_calls" not in plain:
        raise ValueError(f"{where} has no content; give text, or null for none")
    content = turn.get("content")
    if content is None and "tool_calls" in plain and "is none" in template:
        plain["content"] = None
    else:
        plain["content"] = _text(content, f"{where}.content")
    if "tool_calls" in plain:
        calls = plain["tool_calls"]
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise ValueError(f"{where}.tool_calls must be a list")
        plain["tool_calls"] = [_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(calls)]
    return plain


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ValueError(f'{where} is a {type(content).__name__}, must be text or a list of {{"type": "text", ...}}')
    return "\n".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_TYPES:
        raise ValueError(f"{where} is of type {kind}; only parts of type text are read")
    if not isinstance(part.get("text"), str):
        raise ValueError(f'{where} must be {{"type": "text", "text": ...}}')
    return str(part["text"])


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
        raise ValueError(f'{where} must be {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"{where}: its arguments are no JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: its arguments are a {type(arguments).__name__}, must be an object")
    plain = {**function, "arguments": arguments}
    return {**call, "function": plain} if "function" in call else plain
