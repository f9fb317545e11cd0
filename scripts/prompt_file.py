"""A file of prompts as people and other tools write it: JSON lines, a JSON array, lines of OpenAI's batch API.

Read are UTF-8, with a byte order mark or without one, and UTF-16 or 32 with one; LF and CRLF; blank lines; null for
what is not given; OpenAI's names for settings beside the prompt or in "body". A line that cannot be read fails alone.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helix.fields import (
    BY_NAME,
    FIELDS,
    is_ids,
    one_name,
    require_messages,
    require_neutral,
    retention_of,
    take_settings,
    take_template,
)
from helix.request import Request, priority_of
from helix.sampling import SamplingParams

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
LINE_KEYS = (*PROMPT_KEYS, "id", "sampling", "cache_salt", "retention", "priority")
BATCH_KEYS = ("custom_id", "method", "url", "body")
BATCH_URLS = ("/v1/chat/completions", "/v1/completions")
# Keys of HTTP that say how an answer is given: in a file they change nothing, whatever they hold.
NO_EFFECT = (
    "model",
    *(each.name for each in FIELDS if each.kind == "ignored"),
    *("stream", "stream_options", "request_id"),
)
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "Parquet", b"\x28\xb5\x2f\xfd": "Zstandard"}
_log = logging.getLogger(__name__)


def read_requests(path: str, sampling: SamplingParams) -> list[Request]:
    """Return the requests of a file; one that cannot be read becomes one that carries its error.

    Raises:
        ValueError: when the file cannot be read, has no prompt, or is no text.
    """
    items = _items(path)
    if not items:
        raise ValueError(f"prompts = {path} has no prompts; give one JSON object a line")
    requests, place_of = list[Request](), dict[str, str]()
    without_effect: dict[str, None] = {}
    for place, item in items:
        where = f"{path}, {place}"
        request = parse_item(item, where, sampling)
        without_effect |= dict.fromkeys(key for key in NO_EFFECT if isinstance(item, dict) and key in _body(item))
        name = name_of(request.id, len(requests))
        first = place_of.setdefault(name, place)
        if first != place and request.error is None:
            shown = json.dumps(name, ensure_ascii=False)
            which = f"id {shown}" if request.id is not None else f"its id, {shown} by default,"
            request.error = f"{where}: {which} is that of {first}; give every line an id of its own"
        requests.append(request)
    if without_effect:
        _log.info("prompts: %s in %s changes nothing here", ", ".join(without_effect), path)
    return requests


def name_of(given: str | None, index: int) -> str:
    """Return the id of an output line: the one that was given, or the index of its input line, from 0."""
    return str(index) if given is None else given


def parse_item(item: Any, where: str, sampling: SamplingParams) -> Request:
    """Return the request of a line's content, or of its error; ``where`` names the line in errors."""
    if isinstance(item, ValueError):
        return Request(error=f"{where}: {item}")
    if not isinstance(item, dict):
        return Request(error=f"{where}: a {type(item).__name__} where an object is expected")
    name = item.get("custom_id") if item.get("id") is None else item["id"]
    request = Request(id=name if name is None else str(name))
    try:
        if isinstance(name, bool | list | dict):
            raise ValueError(f"id is a {type(name).__name__}, must be a string or a number")
        _fill(request, _body(item, strict=True), sampling)
    except ValueError as error:
        request.error = f"{where}: {error}"
    return request


def parse_line(line: str) -> Any:
    """Return the content of a line, or the ValueError that says why it has none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
        return ValueError(f"not JSON: {reason}")


def _items(path: str) -> list[tuple[str, Any]]:
    """Return the content of each prompt of a file, or why it has none, and where it stands in the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"prompts = {path} cannot be read: {error.strerror}") from error
    kind = next((PACKED[magic] for magic in PACKED if data.startswith(magic)), None)
    if kind is not None:
        raise ValueError(f"prompts = {path} is a {kind} file; unpack it into JSON lines")
    encoding = next((encoding for mark, encoding in MARKS if data.startswith(mark)), "utf-8")
    if encoding in ("utf-16", "utf-32"):
        try:
            data, encoding = data.decode(encoding).encode("utf-8"), "utf-8"
        except UnicodeError as error:
            raise ValueError(f"prompts = {path} is not the {encoding} text that it begins as: {error}") from error
    elif b"\0" in data[:4096]:
        raise ValueError(f"prompts = {path} holds zero bytes: save it as UTF-8, or as UTF-16 with a byte order mark")
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")  # splitlines() also splits at U+2028
    numbered = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    first = next(iter(numbered.values()), b"")
    is_lines = not first.lstrip().startswith(b"[") and not isinstance(_decoded(first or b"{}"), ValueError)
    if not is_lines and (values := _values(b"\n".join(lines))) is not None:
        return [(f"item {number}", value) for number, value in enumerate(values, 1)]
    return [(f"line {number}", _decoded(line)) for number, line in numbered.items()]


def _values(data: bytes) -> list[Any] | None:
    """Return the items of a JSON array, or objects that are each written over several lines; None for lines."""
    try:
        text, values, end = data.decode("utf-8").strip(), list[Any](), 0
        while end < len(text):
            value, end = json.JSONDecoder().raw_decode(text, end)
            values.append(value)
            while end < len(text) and text[end].isspace():
                end += 1
    except (ValueError, RecursionError):
        return None
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _decoded(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text: {error}")
    return parse_line(text)


def _body(item: dict[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """Return what an item asks for, without what is null: itself, or the body of a line of OpenAI's batch API."""
    if "body" in item:
        url, method, body = item.get("url"), item.get("method"), item["body"]
        if strict:
            unknown = [key for key in item if key not in BATCH_KEYS]
            if unknown or not isinstance(body, dict):
                raise ValueError(f"a line with a body takes {', '.join(BATCH_KEYS)}; the body must be an object")
            if url not in (None, *BATCH_URLS) or method not in (None, "POST"):
                raise ValueError(f"{method} {url} is not answered here; give POST and one of {', '.join(BATCH_URLS)}")
        item = {**(body if isinstance(body, dict) else {}), "custom_id": item.get("custom_id")}
    return {key: value for key, value in item.items() if value is not None}


def _fill(request: Request, item: Mapping[str, Any], sampling: SamplingParams) -> None:
    given = one_name(item, {"custom_id": "id"})
    overrides = given.pop("sampling", {})
    if not isinstance(overrides, dict):
        raise ValueError(f"sampling is a {type(overrides).__name__}, must be an object")
    for key, value in take_settings(given).items():
        if key in overrides and overrides[key] != value:
            raise ValueError(f"{key} is given twice, once in sampling; give it once")
        overrides = overrides | {key: value}
    request.sampling = sampling.with_overrides(overrides)
    request.retention = retention_of(given.pop("retention", []))
    request.template = take_template(given)
    for name in ("id", *_foreign(given)):
        given.pop(name, None)
    given["priority"] = priority_of(given.get("priority", 0))
    _take_prompt(given)
    for key, value in given.items():
        setattr(request, key, value)


def _foreign(given: Mapping[str, Any]) -> list[str]:
    """Return the keys of other programs that change no answer; ValueError for any that would, or that is no key."""
    foreign = [key for key in given if key not in LINE_KEYS]
    for key in foreign:
        if key in BY_NAME and key not in NO_EFFECT:
            require_neutral(key, given[key])
        elif key not in NO_EFFECT:
            raise ValueError(f"{key!r} is not a key; the keys are {', '.join(LINE_KEYS)}, and the settings of sampling")
    return foreign


def _take_prompt(given: dict[str, Any]) -> None:
    prompt, ids, messages = (given.get(key) for key in PROMPT_KEYS)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        given["prompt"] = prompt = prompt[0]
    if isinstance(prompt, list) and "prompt_token_ids" not in given:
        if any(isinstance(each, str | list) for each in prompt):
            raise ValueError(f"prompt holds {len(prompt)} prompts; give each a line of its own")
        ids = given["prompt_token_ids"] = given.pop("prompt")
        prompt = None
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt is a {type(prompt).__name__}, must be a string")
    if prompt is not None:
        prompt.encode("utf-8")  # a lone surrogate is legal in JSON and in no text: UnicodeEncodeError, a ValueError
    if ids is not None and not is_ids(ids):
        raise ValueError("prompt_token_ids must be a list of integers")
    if messages is not None:
        require_messages(messages)
    salt = given.get("cache_salt", "")
    if not isinstance(salt, str):
        raise ValueError(f"cache_salt is a {type(salt).__name__}, must be a string")
