"""Chat turns of every client reach the template as texts and objects."""

from typing import Any

import pytest

from helix.messages import plain_messages

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
PLAIN_CALL = CALL | {"function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"content": "hi"}, {"content": "hi"}),
        (
            {"content": [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]},
            {"content": "a\nb\nc"},
        ),
        ({"content": []}, {"content": ""}),
        ({"content": None, "name": None, "refusal": None}, {"content": ""}),
        ({"content": None, "tool_calls": [CALL]}, {"content": "", "tool_calls": [PLAIN_CALL]}),
        ({"content": "", "tool_calls": [PLAIN_CALL]}, {"content": "", "tool_calls": [PLAIN_CALL]}),
        (
            {"content": "", "tool_calls": [{"name": "now", "arguments": ""}, {"name": "now"}]},
            {"content": "", "tool_calls": [{"name": "now", "arguments": {}}] * 2},
        ),
        ({"content": "3", "tool_call_id": "c1"}, {"content": "3", "tool_call_id": "c1"}),
    ],
)
def test_turns_become_what_templates_expect(turn: dict[str, Any], expected: dict[str, Any]) -> None:
    before = repr(turn)
    assert plain_messages([turn | {"role": "x"}], "{{ message.content }}") == [expected | {"role": "x"}]
    assert repr(turn) == before, "what was given stays as it is"


def test_null_beside_tool_calls_stays_where_the_template_asks_for_it() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    (plain,) = plain_messages([turn], "{% if message['content'] is none %}")
    assert plain["content"] is None
    assert plain_messages([{"role": "user", "content": None}], "is none") == [{"role": "user", "content": ""}]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": "hi"}, 'messages[0] must be an object {"role": ..., "content": ...}'),
        ({"role": "user", "contents": "hi"}, "messages[0] has no content; give text, or null for none"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0] is of type image_",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": 3}]},
            'messages[0].content[0] must be {"type": "text", ',
        ),
        ({"role": "user", "content": [3]}, "messages[0].content[0] is of type int; only parts of type text are read"),
        ({"role": "user", "content": 3}, "messages[0].content is a int, must be text or a list"),
        ({"role": "x", "tool_calls": [{"function": {}}]}, 'messages[0].tool_calls[0] must be {"type": "function", '),
        ({"role": "x", "tool_calls": "add"}, "messages[0].tool_calls must be a list"),
        (
            {"role": "x", "tool_calls": [{"name": "f", "arguments": "{"}]},
            "messages[0].tool_calls[0]: its arguments are no",
        ),
        (
            {"role": "x", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
            "messages[0].tool_calls[0]: its arguments are a",
        ),
    ],
)
def test_what_is_no_turn_is_refused_by_name(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        plain_messages([turn], "")
    assert str(refused.value).startswith(message)
