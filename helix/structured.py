"""What an answer's text must be, as a request asks for it: a JSON schema, a regular expression, a grammar.

Requests name it as other servers do, one of ``NAMES``; here it has one form, a mapping of one of ``KINDS`` to its text.
That of "call" is JSON: what a tool call begins with, the schema of what follows, and what it ends with.
What is found here needs no compiler: bounds, and what a schema asks for that would silently not be kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = ("json", "regex", "grammar", "call")
NAMES = ("json", "json_object", "regex", "choice", "grammar")
MAX_BYTES, MAX_DEPTH = 1 << 16, 32
_SETTING = "sampling.structured_outputs"

# Keywords that no grammar holds an answer to.
_NOT_KEPT = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "dependentRequired",
    "dependentSchemas", "dependencies", "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_ANNOTATIONS = (
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment",
    "$defs", "definitions", "$anchor", "discriminator",
)  # fmt: skip
# Keywords that count only where a type is named.
_OF_TYPES = (
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "minItems", "maxItems", "required", "minProperties", "maxProperties", "propertyNames",
    "patternProperties",
)  # fmt: skip
_ALONE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties")
_TYPES = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "array": (list,), "object": (dict,),
}  # fmt: skip


def structured(given: Any) -> dict[str, str]:
    """Return what is asked for in its one form; nothing where nothing is.

    Raises:
        ValueError: in one line, for what is none, exceeds ``MAX_BYTES`` or ``MAX_DEPTH``, or would not be kept.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{_SETTING} is a {type(given).__name__}, must be an object such as {{'json': SCHEMA}}")
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return {}
    if len(asked) > 1 or next(iter(asked)) not in (*NAMES, "call"):
        raise ValueError(f"{_SETTING} = {_short(list(asked))} must hold one of {', '.join(NAMES)}")
    [(name, value)] = asked.items()
    kind, text = _one_form(name, value)
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{_SETTING}.{name} is no valid text: it has a lone surrogate") from error
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{_SETTING}.{name} has {num_bytes} bytes, must have at most {MAX_BYTES}")
    if kind in ("json", "call"):
        schema = _parsed(text, name)
        if kind == "call":
            if not (isinstance(schema, dict) and all(isinstance(schema.get(end), str) for end in ("begin", "end"))):
                raise ValueError(f'{_SETTING}.{name} must be {{"begin": TEXT, "schema": SCHEMA, "end": TEXT}}')
            schema = schema.get("schema")
        _check_schema(schema, name)
    return {kind: text}


def from_response_format(given: Any) -> dict[str, Any]:
    """Return the ``structured_outputs`` that OpenAI's response_format stands for; nothing for text."""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    inner = given.get("json_schema") if kind == "json_schema" else None
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict | bool):
        raise ValueError(
            'response_format must be {"type": "text"}, {"type": "json_object"}, or '
            '{"type": "json_schema", "json_schema": {"schema": ...}}'
        )
    return {"json": inner["schema"]}


def _one_form(name: str, value: Any) -> tuple[str, str]:
    setting = f"{_SETTING}.{name}"
    if name == "json":
        if isinstance(value, dict | bool):
            require_depth(value, name)
            return "json", json.dumps(value, ensure_ascii=False)
    elif name == "json_object":
        if value is True:
            return "json", '{"type": "object"}'
        raise ValueError(f"{setting} = {_short(value)} must be true, or left out")
    elif name == "choice":
        if isinstance(value, list | tuple) and value and all(isinstance(each, str) and each for each in value):
            return "grammar", "root ::= " + " | ".join(map(_literal, value))
        raise ValueError(f"{setting} = {_short(value)} must be a list of texts, none of them empty")
    if isinstance(value, str) and value.strip():
        return name, value
    what = "a schema: an object, or its text" if name == "json" else "a text that is not empty"
    raise ValueError(f"{setting} = {_short(value)} must be {what}")


def _literal(text: str) -> str:
    """Return a text as a literal of a grammar."""
    escaped = (char if char.isalnum() and char.isascii() else f"\\U{ord(char):08x}" for char in text)
    return f'"{"".join(escaped)}"'


def _parsed(text: str, name: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_SETTING}.{name} is not JSON: {error}") from error
    require_depth(schema, name)
    return schema


def require_depth(value: Any, name: str) -> None:
    """Raise ValueError for a value of a setting that nests too deep; it never recurses."""
    layer, depth = [value], 0
    while layer := [each for each in layer if isinstance(each, dict | list | tuple)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{_SETTING}.{name} is nested more than {MAX_DEPTH} deep")
        layer = [inner for each in layer for inner in (each.values() if isinstance(each, dict) else each)]


def _check_schema(schema: Any, name: str) -> None:
    """Raise ValueError for what an answer would not be held to, though the schema asks for it."""
    for place, each in _subschemas(schema, "#"):
        problem = _problem(each)
        if problem is not None:
            raise ValueError(f"{_SETTING}.{name} has {problem} at {place}, which is not supported")


def _subschemas(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a schema and all that it holds, each with its place."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for key, value in schema.items():
        inner: Iterator[tuple[str, Any]] = iter(())
        if key in _OF_SCHEMAS and isinstance(value, dict):
            inner = ((f"{place}/{key}/{name}", each) for name, each in value.items())
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            inner = ((f"{place}/{key}/{number}", each) for number, each in enumerate(value))
        elif key in _SCHEMAS:
            inner = iter([(f"{place}/{key}", value)])
        for where, each in inner:
            yield from _subschemas(each, where)


def _problem(schema: dict[str, Any]) -> str | None:
    """Return what of a schema itself is not kept; None where all is."""
    found = next((key for key in _NOT_KEPT if schema.get(key, False) is not False), None)
    if found is not None:
        return f'"{found}"'
    alone = next((key for key in _ALONE if key in schema), None)
    others = [key for key in schema if key not in (alone, *_ANNOTATIONS) and not key.startswith("x-")]
    if alone in ("const", "enum") and others == ["type"] and _are_of(schema, alone):
        others = []
    if alone is not None and others:
        return f'"{alone}" beside "{others[0]}"'
    if "type" not in schema and (of := next((key for key in _OF_TYPES if key in schema), None)) is not None:
        return f'"{of}" without "type"'
    if "format" in schema and "pattern" in schema:
        return '"format" beside "pattern"'
    named = schema.get("patternProperties")
    patterns = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
    wrong = next((each for each in patterns if isinstance(each, str) and _breaks_strings(each)), None)
    return None if wrong is None else f"pattern {_short(wrong)}, with a quote, backslash or control character,"


def _are_of(schema: dict[str, Any], alone: str) -> bool:
    """Return whether the values that a schema names are of the type, or types, beside them."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    values = schema["enum"] if alone == "enum" and isinstance(schema["enum"], list) else [schema.get("const")]
    allowed = {kind for name in kinds if isinstance(name, str) for kind in _TYPES.get(name, ())}
    return all(type(value) in allowed for value in values)


def _breaks_strings(pattern: str) -> bool:
    """Return whether a pattern spells what JSON's strings write otherwise: it would stand there as it is."""
    escapes = (pattern[at + 1 : at + 2] for at in _escapes(pattern))
    wide = any(start <= "\\" and end > "\x7f" for start, end in re.findall("(?s)(.)-(.)", pattern))
    return wide or any(char == '"' or char < " " for char in pattern) or any(char in "\\xucnrtfv0" for char in escapes)


def _escapes(pattern: str) -> Iterator[int]:
    """Yield where escapes begin."""
    at = pattern.find("\\")
    while at >= 0:
        yield at
        at = pattern.find("\\", at + 2)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
