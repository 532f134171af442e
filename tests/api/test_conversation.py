"""Conversations with calls and their results, as templates are handed them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.bodies import Form, parse
from api.conversation import Messages, unknown_in_messages
from api.errors import ApiError


class Body(Form):
    messages: Messages


def told(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What the template sees, without what is not there."""
    body = parse(json.dumps({"messages": messages}).encode(), Body)
    assert unknown_in_messages(body.messages) == {}
    return [
        {name: value for name, value in message.for_template().items() if value is not None}
        for message in body.messages
    ]


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": "a",
        "type": "function",
        "function": {"name": "f", "arguments": arguments},
        **more,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("{}", {})],
)
def test_arguments_of_calls_become_objects(arguments: Any, expected: Any) -> None:
    (turn,) = told({"role": "assistant", "content": None, "tool_calls": [call(arguments)]})
    assert turn == {"role": "assistant", "content": "", "tool_calls": [call(expected)]}


def test_results_keep_their_call_and_thoughts_their_turn() -> None:
    result = {"role": "tool", "tool_call_id": "a", "name": "f", "content": "1"}
    thought = {"role": "assistant", "content": "so", "reasoning_content": "hm", "refusal": None}
    assert told(result, thought) == [
        result,
        {"role": "assistant", "content": "so", "reasoning_content": "hm"},
    ]


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert told({"role": "user", "content": parts}) == [{"role": "user", "content": "ab"}]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"role": "assistant", "content": None}, "messages.0.content"),
    ({"role": "user", "content": "x", "tool_calls": [call("{}")]}, "messages.0.tool_calls"),
    ({"role": "user", "tool_calls": []}, "messages.0.content"),
    (
        {"role": "assistant", "tool_calls": [call("[1]")]},
        "messages.0.tool_calls.0.function.arguments",
    ),
    (
        {"role": "assistant", "tool_calls": [call("{")]},
        "messages.0.tool_calls.0.function.arguments",
    ),
    (
        {"role": "assistant", "tool_calls": [call("{}", type="custom")]},
        "messages.0.tool_calls.0.type",
    ),
    ({"role": "assistant", "tool_calls": [call("{}")] * 129}, "messages.0.tool_calls"),
    ({"role": "assistant", "content": "x", "function_call": {}}, "messages.0.function_call"),
]


@pytest.mark.parametrize(("message", "param"), REFUSED)
def test_a_message_that_is_none_is_refused_by_name(message: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        told(message)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_unknown_fields_of_calls_are_found_by_dotted_name() -> None:
    message = {"role": "assistant", "tool_calls": [call("{}", index=0)]}
    body = parse(json.dumps({"messages": [message]}).encode(), Body)
    assert unknown_in_messages(body.messages) == {"messages.0.tool_calls.0.index": 0}
