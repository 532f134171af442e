"""Items of `input`, and the messages that they make for the template."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from api.errors import ApiError
from api.responses_input import Input, items_of, messages_of

INPUT: TypeAdapter[Input] = TypeAdapter(Input)
HI = {"role": "user", "content": "hi"}


def call(number: int) -> dict[str, Any]:
    arguments = f'{{"day": {number}}}'
    return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": arguments}


def output(number: int) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": f"out {number}"}


def thought(text: str) -> dict[str, Any]:
    return {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


def said(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "role": "assistant", "status": "completed", "content": [part]}


def called(*numbers: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"c{number}",
            "type": "function",
            "function": {"name": "f", "arguments": {"day": number}},
        }
        for number in numbers
    ]


def tool(number: int) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": f"c{number}",
        "name": "f",
        "content": f"out {number}",
    }


def messages(given: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    """By way of the form, as a body goes."""
    return messages_of(instructions, items_of(INPUT.validate_python(given, strict=True), {}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi", [HI]),
        ([HI, said("yes"), HI], [HI, {"role": "assistant", "content": "yes"}, HI]),
        ([{"role": "developer", "content": "x"}, HI], [{"role": "system", "content": "x"}, HI]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": part} for part in "ab"]}],
            [{"role": "user", "content": "ab"}],
        ),
        (
            [HI, thought("hm"), said("wait"), call(1), call(2), output(1), output(2)],
            [
                HI,
                {
                    "role": "assistant",
                    "content": "wait",
                    "reasoning_content": "hm",
                    "tool_calls": called(1, 2),
                },
                tool(1),
                tool(2),
            ],
        ),
        (
            [HI, call(1), output(1), call(2), output(2)],
            [
                HI,
                {"role": "assistant", "content": "", "tool_calls": called(1)},
                tool(1),
                {"role": "assistant", "content": "", "tool_calls": called(2)},
                tool(2),
            ],
        ),
        (
            [said("one"), said("two"), thought("hm"), thought("hm")],
            [
                {"role": "assistant", "content": "one"},
                {"role": "assistant", "content": "two"},
                {"role": "assistant", "content": "", "reasoning_content": "hm"},
                {"role": "assistant", "content": "", "reasoning_content": "hm"},
            ],
        ),
    ],
)
def test_what_a_model_did_in_a_row_is_one_message(given: Any, expected: Any) -> None:
    assert messages(given) == expected


def test_instructions_and_the_first_system_message_are_one() -> None:
    system = {"role": "system", "content": "be kind"}
    assert messages([system, HI, system], "be brief") == [
        {"role": "system", "content": "be brief\n\nbe kind"},
        HI,
        system,
    ]


def test_a_reference_stands_for_the_item_it_names() -> None:
    item = {"id": "m1", **said("yes")}
    given = INPUT.validate_python([{"id": "m1"}, {"type": "item_reference", "id": "m1"}])
    assert items_of(given, {"m1": item}) == [item, item]


def test_an_item_keeps_its_id_and_gets_one_where_it_has_none() -> None:
    first, second = items_of(INPUT.validate_python([{**HI, "id": "mine"}, HI]), {})
    assert first["id"] == "mine"
    assert second["id"].startswith("msg_")


def test_a_call_that_was_cut_cannot_be_continued() -> None:
    with pytest.raises(ApiError, match="c1") as error:
        messages_of(None, [{**call(1), "arguments": '{"day'}])
    assert error.value.param == "input"
