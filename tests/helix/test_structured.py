"""What structured_outputs may be: one of its names, within bounds, and nothing that an answer would not be held to."""

from typing import Any

import pytest

from helix.sampling import SamplingParams
from helix.structured import MAX_BYTES, from_response_format, structured


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({}, {}),
        ({"json": None}, {}),
        ({"json": {"type": "null"}}, {"json": '{"type": "null"}'}),
        ({"json": '{"type":"null"}', "regex": None}, {"json": '{"type":"null"}'}),
        ({"json": True}, {"json": "true"}),
        ({"json": nested(32)}, None),
        ({"json_object": True}, {"json": '{"type": "object"}'}),
        ({"regex": "a|b"}, {"regex": "a|b"}),
        ({"choice": ["a", 'b"']}, {"grammar": 'root ::= "a" | "b\\U00000022"'}),
        ({"json": {"properties": {"not": {"const": 1, "type": "integer"}}}}, None),
        (
            {
                "json": {
                    "$ref": "#/$defs/x",
                    "title": "t",
                    "$defs": {"x": {"type": "string", "pattern": "^\\d\\.[^a]$"}},
                }
            },
            None,
        ),
    ],
)
def test_it_has_one_form(given: dict[str, Any], form: dict[str, str] | None) -> None:
    found = structured(given)
    assert form is None or found == form
    assert structured(found) == found
    assert SamplingParams(structured_outputs=given).structured_outputs == found


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("json", "is a str, must be an object"),
        ({"json": {}, "regex": "a"}, "must hold one of json"),
        ({"jsno": {}}, "must hold one of json"),
        ({"json": "{"}, "json is not JSON"),
        ({"json": "[" * 5_000}, "json is"),
        ({"json": nested(33)}, "nested more than 32 deep"),
        ({"json": {"title": "x" * MAX_BYTES}}, f"must have at most {MAX_BYTES}"),
        ({"json_object": False}, "must be true"),
        ({"regex": ""}, "must be a text that is not empty"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"choice": ["a", ""]}, "must be a list of texts, none of them empty"),
        ({"json": {"items": {"not": {}}}}, 'has "not" at #/items, which'),
        ({"json": {"$defs": {"x": {"uniqueItems": True}}}}, 'has "uniqueItems" at #/$defs/x'),
        ({"json": {"anyOf": [{}], "type": "object"}}, 'has "anyOf" beside "type" at #'),
        ({"json": {"enum": [1, "x"], "type": "string"}}, 'has "enum" beside "type"'),
        ({"json": {"minLength": 3}}, 'has "minLength" without "type"'),
        ({"json": {"type": "string", "format": "date", "pattern": "a"}}, 'has "format" beside "pattern"'),
        ({"json": {"type": "string", "pattern": 'a"'}}, "with a quote, backslash"),
        ({"json": {"type": "object", "patternProperties": {"\\\\": {}}}}, "with a quote, backslash"),
        ({"json": {"type": "string", "pattern": "\\x22"}}, "with a quote, backslash"),
        ({"json": {"type": "string", "pattern": "[!-ÿ]"}}, "with a quote, backslash"),
        ({"call": "[]"}, 'call must be {"begin"'),
        ({"call": '{"begin": "<", "schema": {}}'}, 'call must be {"begin"'),
    ],
)
def test_anything_else_is_refused(given: Any, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(structured_outputs=given)
    assert str(caught.value).startswith("sampling.structured_outputs") and problem in str(caught.value)


@pytest.mark.parametrize("setting", [{"ignore_eos": True}, {"min_tokens": 1}, {"bad_words": ["x"]}])
def test_what_the_form_of_an_answer_rules_out_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"}, **setting)


def test_response_format_is_another_name() -> None:
    assert from_response_format({"type": "text"}) == {}
    assert from_response_format({"type": "json_object"}) == {"json_object": True}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "null"}}}
    assert from_response_format(asked) == {"json": {"type": "null"}}
    for wrong in ({}, "text", {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": 1}}):
        with pytest.raises(ValueError, match="^response_format must be"):
            from_response_format(wrong)
