"""Tells content, reasoning and tool calls of an answer apart, by transformers' parser and a response template."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import one_line

CONTENT, REASONING, TOOL_CALL = "content", "reasoning", "tool_call"
_KINDS = {"content": CONTENT, "reasoning": REASONING, "reasoning_content": REASONING, "thinking": REASONING}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """Something new of an answer: text of its content or reasoning, or a whole tool call.

    Attributes:
        kind: CONTENT, REASONING or TOOL_CALL.
        text: of the first two; of a call, its arguments as JSON.
        name: of the called function.
        id: of the call.
    """

    kind: str
    text: str
    name: str = ""
    id: str = ""


def response_template(path: str | None, tokenizer: Any = None) -> Any:
    """Return the response template of a file, or else the tokenizer's; None where there is none.

    Raises:
        ValueError: where it is no response template.
    """
    spec = getattr(tokenizer, "response_template", None)
    if path is None and spec is None:
        return None
    from transformers.utils.chat_parsing.response_templates import load_response_template

    if path is None:
        return load_response_template(spec)
    name = f"serve.response_template = {path}"
    try:
        return load_response_template(json.loads(Path(path).expanduser().read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is no response template: {one_line(error)}") from error


class AnswerParser:
    """Reads one answer as it comes. What is not what its template says stays as it is, as content.

    Args:
        template: the response template.
        prompt: the text before the answer, whose end may begin a part of it.
        tools: that the answer may call.
    """

    def __init__(self, template: Any, prompt: str, tools: Sequence[dict[str, Any]] = ()) -> None:
        from transformers.utils.chat_parsing.response_parser import ResponseParser

        self._parser: Any = ResponseParser(template, prefix=prompt, tools=list(tools))
        self._open = ""  # text of a region that is told when it closes
        for event in self._parser.initial_events:
            if event["type"] == "region_chunk" and event["dirty"]:
                self._open += event["text"]

    def push(self, text: str, *, ends: bool) -> list[Part]:
        """Return what some text adds; ``ends`` is set with the last one."""
        if self._parser is None:
            return [Part(CONTENT, text)] if text else []
        pending = self._open + text
        try:
            events = self._parser.feed(text)
            if ends:
                events += self._parser.finalize()[1]
        except (ValueError, KeyError, TypeError) as error:
            _log.info("an answer does not keep to its response template: %s", error)
            self._parser = None
            return [Part(CONTENT, pending)] if pending else []
        parts: list[Part] = []
        for event in events:
            parts += self._parts(event)
        return parts

    def _parts(self, event: dict[str, Any]) -> list[Part]:
        kind, field = event["type"], event["field"]
        if kind == "region_chunk" and field in _KINDS and not event["dirty"]:
            return [Part(_KINDS[field], event["text"])]
        if kind == "region_chunk":
            self._open += event["text"]
        if kind != "region_close":
            return []
        self._open = ""
        if field != "tool_calls":
            return []
        calls = event["value"] if isinstance(event["value"], list) else [event["value"]]
        return [_call(call) for call in calls]


def _call(value: dict[str, Any]) -> Part:
    function = value["function"]
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Part(TOOL_CALL, text, function["name"], f"call_{secrets.token_hex(12)}")
