"""Tools with the small real model, whose template knows none: a call that must be made is made."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema

from api.chat import router
from tests.api.in_process import serve

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
}
FUNCTION = {"name": "get_weather", "description": "The weather of a city", "parameters": SCHEMA}
BODY = {
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [{"type": "function", "function": FUNCTION}],
    "temperature": 0,
    "max_tokens": 80,
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


async def answers(model: Path, *bodies: dict[str, Any]) -> list[str]:
    flags = {"BACKEND_IMPL": "hf", "DTYPE": "float32", "PAGE_TOKEN_BUDGET": 2048}
    async with serve(router, MODEL_LOCAL_DIR=model, **flags) as server:
        path = "/v1/chat/completions"
        return [(await server.client.post(path, json=body)).text for body in bodies]


def call_of(deltas: list[dict[str, Any]]) -> tuple[str, str]:
    """The name and the arguments that a stream's deltas add up to."""
    pieces = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call for delta in deltas for call in delta.get("tool_calls", ()) if call["index"]] == []
    return (
        "".join(piece.get("name", "") for piece in pieces),
        "".join(piece.get("arguments", "") for piece in pieces),
    )


def test_the_named_tool_is_called_with_arguments_that_match_streamed_as_whole(
    small_model: Path,
) -> None:
    body = {**BODY, "tool_choice": NAMED}
    whole, streamed = asyncio.run(answers(small_model, body, {**body, "stream": True}))
    found = json.loads(whole)["choices"][0]
    (call,) = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    jsonschema.validate(arguments, SCHEMA)
    assert arguments["city"] == "Paris"

    events = [json.loads(line[6:]) for line in streamed.split("\n\n") if line[6:7] == "{"]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert call_of(deltas) == ("get_weather", call["function"]["arguments"])
    assert len(deltas) > 5
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
