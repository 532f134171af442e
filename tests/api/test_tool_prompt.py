"""Tools for templates that know none: the words of the format that answers are then read in."""

from __future__ import annotations

import json
from typing import Any

from api.hearing import Tool
from api.speech import CallStart
from api.tool_calls import CallReader
from api.tool_formats import FORMATS
from api.tool_prompt import in_words

TOOL = Tool("f", "does {something}", {"type": "object", "properties": {}}).for_template()
USER = {"role": "user", "content": "Go."}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tools_stand_in_the_system_s_message() -> None:
    (alone, user) = in_words([USER], [TOOL])
    assert user == USER
    assert alone["role"] == "system"
    assert json.dumps(TOOL) in alone["content"]
    (system, _) = in_words([{"role": "system", "content": "Be brief."}, USER], [TOOL])
    assert system["content"] == f"Be brief.\n\n{alone['content']}"


def test_a_conversation_without_tools_is_left_as_it_is() -> None:
    assert in_words([USER], None) == [USER]


def test_calls_are_told_as_the_model_would_write_them() -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [call("f", a="é"), call("g")]}
    (told,) = in_words([turn], None)
    assert told.keys() == {"role", "content"}
    said = CallReader(FORMATS["hermes"], {"f": {}, "g": {}}).feed(told["content"])
    assert [each.name for each in said if isinstance(each, CallStart)] == ["f", "g"]
    assert '{"a": "é"}' in told["content"]
    (spoken,) = in_words([{**turn, "content": "Well."}], None)
    assert spoken["content"] == f"Well.\n{told['content']}"


def test_results_that_follow_each_other_are_one_message_of_the_user() -> None:
    results = [{"role": "tool", "content": text} for text in ("1", "2")]
    (told,) = in_words(results, None)
    assert told["role"] == "user"
    assert told["content"] == (
        "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    )
