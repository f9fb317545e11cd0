"""Random JSON schemas of all that is kept, and whether a value is as its schema says: written without the compiler."""

import re
from random import Random
from typing import Any

NAMES = ["a", "b", "käse", 'quo"te', "back\\slash", "two words", "日本", "x\ny"]
PATTERNS = ["^[a-c]{2}$", "^[0-9]+(px|em)$", "^(yes|no)?$", "^\\d{1,3}\\.\\d$", "^[^x]{0,3}$"]


def random_schema(rng: Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema of at most so many levels; some refer to one of their definitions, which may hold itself."""
    schema = _schema(rng, depth)
    if rng.random() < 0.15:
        node = {"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
                "required": ["v"], "additionalProperties": False}  # fmt: skip
        schema = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2, "$defs": {"node": node}}
    return schema


def _schema(rng: Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "any of"]
    kind = rng.choice(kinds if depth == 0 else [*kinds, *["object", "array", "tuple", "map"] * 3])
    if kind == "string":
        least = rng.randrange(4)
        return {"type": kind, "minLength": least, "maxLength": least + rng.randrange(5)}
    if kind in ("integer", "number"):
        least = rng.randrange(-200, 200)
        return {"type": kind, "minimum": least, "maximum": least + rng.randrange(500)}
    if kind == "enum":
        return {"enum": rng.sample([1, -2.5, None, True, "x", 'q"', "é\n", [1, {"k": []}], {}], rng.randint(1, 5))}
    if kind == "const":
        return {"const": rng.choice([0, "const", {"deep": [None]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == "any of":
        return {"anyOf": [_schema(rng, max(depth - 1, 0)) for _ in range(rng.randint(1, 3))], "title": "one of them"}
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(1, 4))
        properties = {name: _schema(rng, depth - 1) for name in names}
        return {"type": kind, "properties": properties, "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": False}  # fmt: skip
    if kind == "array":
        least = rng.randrange(3)
        return {"type": kind, "items": _schema(rng, depth - 1), "minItems": least, "maxItems": least + rng.randrange(3)}
    if kind == "tuple":
        items = [_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if kind == "map":
        return {"type": "object", "additionalProperties": _schema(rng, depth - 1), "maxProperties": 2}
    return {"type": kind}


def is_valid(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """Say whether a value is as a schema of ``random_schema`` says."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return is_valid(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(is_valid(value, each, root) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(_same(value, each) for each in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "string":
        is_long = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9) if _is(value, str) else 0
        return bool(is_long) and re.search(schema.get("pattern", ""), value) is not None
    if kind in ("integer", "number"):
        is_number = _is(value, int) or (kind == "number" and _is(value, float))
        return is_number and schema["minimum"] <= value <= schema["maximum"]
    if kind == "array":
        if not (_is(value, list) and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9)):
            return False
        first = schema.get("prefixItems", [])
        each_of = [first[at] if at < len(first) else schema["items"] for at in range(len(value))]
        return all(is_valid(item, each, root) for item, each in zip(value, each_of, strict=True))
    if kind == "object":
        if not (_is(value, dict) and set(schema.get("required", ())) <= set(value)):
            return False
        of, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        few = len(value) <= schema.get("maxProperties", 10**9)
        return few and all(is_valid(item, of.get(name, others), root) for name, item in value.items())
    return value is None if kind == "null" else _is(value, bool)


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other
