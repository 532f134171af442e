"""What the model sees of an Anthropic conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from api.anthropic_conversation import conversation
from api.anthropic_form import CountFields
from api.bodies import parse_value
from api.errors import ApiError


def shown(messages: list[Any], **more: object) -> list[dict[str, Any]]:
    """The messages for the template."""
    fields = parse_value({"model": "fake", "messages": messages, **more}, CountFields)
    return conversation(fields.system, fields.messages)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def call(id: str = "toolu_1", name: str = "sum", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": arguments}


def result(content: Any = "3", id: str = "toolu_1", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **more}


def test_a_text_and_a_text_block_are_the_same() -> None:
    assert shown([{"role": "user", "content": "hi"}]) == shown([user(text("hi"))])


@pytest.mark.parametrize("system", ["be kind", [text("be "), text("kind")]])
def test_the_system_prompt_comes_first(system: object) -> None:
    messages = shown([user(text("hi"))], system=system)
    assert messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
    ]


def test_an_empty_system_prompt_is_none() -> None:
    assert [each["role"] for each in shown([user(text("hi"))], system=[])] == ["user"]


def test_blocks_of_one_message_are_concatenated_and_messages_of_one_role_are_one_turn() -> None:
    messages = [user(text("a"), text("b")), user(text("c")), assistant(text("d")), user(text("e"))]
    assert [(each["role"], each["content"]) for each in shown(messages)] == [
        ("user", "ab\nc"),
        ("assistant", "d"),
        ("user", "e"),
    ]


def test_calls_and_their_results_are_in_the_form_of_openais_chat() -> None:
    ask = assistant(
        {"type": "thinking", "thinking": "add them", "signature": "x"},
        {"type": "redacted_thinking", "data": "opaque"},
        text("Let me see."),
        call(a=1, b=2),
        call("toolu_2", "mul", a=3),
    )
    answer = user(result(), result([text("9"), text("!")], "toolu_2"), text("and now?"))
    _, asked, first, second, after = shown([user(text("1+2?")), ask, answer])
    assert (asked["role"], asked["content"]) == ("assistant", "Let me see.")
    assert asked["reasoning_content"] == "add them"
    calls = [(each["id"], each["type"], each["function"]["name"]) for each in asked["tool_calls"]]
    assert calls == [("toolu_1", "function", "sum"), ("toolu_2", "function", "mul")]
    assert asked["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": 2}
    tool = {"role": "tool", "tool_call_id": "toolu_1", "name": "sum", "content": "3"}
    assert first == tool
    assert second == {**tool, "tool_call_id": "toolu_2", "name": "mul", "content": "9!"}
    assert after == {"role": "user", "content": "and now?"}


def test_a_message_that_only_calls_has_an_empty_content() -> None:
    _, asked, _ = shown([user(text("1+2?")), assistant(call()), user(result())])
    assert asked["content"] == ""


def test_the_model_is_told_that_a_call_failed() -> None:
    conversations = [user(text("1+2?")), assistant(call()), user(result("no", is_error=True))]
    assert shown(conversations)[-1]["content"] == "Error: no"


def test_an_answer_may_be_empty_and_a_result_may_be_missing_its_content() -> None:
    empty = {"type": "tool_result", "tool_use_id": "toolu_1"}
    messages = shown(
        [user(text("hi")), assistant(), user(text("?")), assistant(call()), user(empty)]
    )
    assert [each["content"] for each in messages] == ["hi", "", "?", "", ""]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([user(text("hi")), user(result())], "messages.1.tool_use_id"),
        ([user(text("hi")), assistant(call()), user(result(), result())], "messages.2.tool_use_id"),
        ([user(text("hi")), assistant(call())], "messages.1"),
        ([user(text("hi")), assistant(call()), user(text("and?"))], "messages.1"),
    ],
)
def test_calls_and_results_without_each_other_are_refused(
    messages: list[Mapping[str, Any]], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        shown(messages)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message
