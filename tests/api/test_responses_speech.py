"""`/v1/responses`: thoughts, calls of tools and bound answers, whole and streamed."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from api.hearing import Named
from tests.api.in_process import Server
from tests.api.openai_bench import text_of
from tests.api.responses_bench import (
    GREEDY,
    PATH,
    SCORED,
    SEEDED,
    WEATHER,
    events_of,
    hear_everything,
    nameless,
    post,
    run,
)

BOUND: dict[str, Any] = {
    "model": "fake",
    "input": "Where?",
    "temperature": 0,
    "extra_body": {"seed": 1},
    "max_output_tokens": 300,
}


def test_thoughts_words_and_calls_are_items_of_their_own() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.responses.create(**GREEDY, tools=[WEATHER], max_output_tokens=12)
        said = text_of(server)
        thought, message, *calls = answer.output
        assert thought.type == "reasoning"
        assert thought.content is not None
        assert [part.text for part in thought.content] == [said[:3]]
        assert answer.output_text == said[3:6]
        assert message.type == "message"
        assert [call.to_dict()["arguments"] for call in calls] == [said[6:9], said[9:12]]
        assert [call.to_dict()["call_id"] for call in calls] == ["call_0", "call_1"]
        statuses = [item.to_dict()["status"] for item in answer.output]
        assert statuses == ["completed"] * 3 + ["incomplete"]

    (wish,) = hear_everything(check)
    assert [tool.name for tool in wish.tools] == ["weather"]
    assert wish.choice == "auto"


@pytest.mark.parametrize("asked", [GREEDY, SEEDED])
def test_everything_that_is_heard_is_streamed_as_it_is_told_whole(asked: dict[str, Any]) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        body = {**asked, "tools": [WEATHER], "max_output_tokens": 17}
        await server.client.post(PATH, json=body)
        whole = (await server.client.post(PATH, json=body)).json()
        streamed = await server.client.post(PATH, json={**body, "stream": True})
        events = events_of(streamed.text)
        assert nameless(events[-1]["response"]) == nameless(whole)
        done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
        assert done == events[-1]["response"]["output"]
        for kind, field in [("function_call_arguments", "arguments"), ("reasoning_text", "text")]:
            deltas = [e["delta"] for e in events if e["type"] == f"response.{kind}.delta"]
            ends = [e[field] for e in events if e["type"] == f"response.{kind}.done"]
            assert "".join(deltas) == "".join(ends) != ""

    hear_everything(check)


@pytest.mark.parametrize(
    ("choice", "wished", "tools"),
    [
        ("required", "required", ["weather", "time"]),
        ({"type": "function", "name": "time"}, Named("time"), ["weather", "time"]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "time"}],
            },
            "required",
            ["time"],
        ),
    ],
)
def test_a_choice_of_tools_is_wished(choice: Any, wished: Any, tools: list[str]) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        both = [WEATHER, {"type": "function", "name": "time"}]
        body = {**GREEDY, "tools": both, "tool_choice": choice, "max_output_tokens": 1}
        answer = await server.client.post(PATH, json=body)
        assert answer.json()["tool_choice"] == choice

    (wish,) = hear_everything(check)
    assert wish.choice == wished
    assert [tool.name for tool in wish.tools] == tools


# Bound answers


class City(BaseModel):
    name: Literal["paris", "rome"]
    people: Literal[1, 2]


def test_the_client_parses_an_answer_into_its_own_type() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        parsed = await client.responses.parse(**BOUND, text_format=City)
        assert parsed.status == "completed"
        assert isinstance(parsed.output_parsed, City)
        async with client.responses.stream(**BOUND, text_format=City) as stream:
            last = await stream.get_final_response()
        assert last.output_parsed == parsed.output_parsed
        assert parsed.text is not None
        assert parsed.text.format is not None
        assert parsed.text.format.type == "json_schema"

    run(check)


def test_a_required_call_matches_its_schema_whole_and_streamed() -> None:
    tool = {**WEATHER, "parameters": City.model_json_schema()}
    body = {**SEEDED, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}

    async def check(server: Server, client: AsyncOpenAI) -> None:
        whole = (await server.client.post(PATH, json=body)).json()
        assert whole["status"] == "completed"
        assert {item["type"] for item in whole["output"]} == {"function_call"}
        for call in whole["output"]:
            assert call["name"] == "weather"
            City.model_validate_json(call["arguments"])
        events = events_of((await server.client.post(PATH, json={**body, "stream": True})).text)
        streamed = events[-1]["response"]["output"]
        assert [call["arguments"] for call in streamed] == [
            call["arguments"] for call in whole["output"]
        ]

    run(check)


def test_a_schema_that_cannot_be_honoured_is_a_400_that_names_the_keyword() -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    error = post({"input": "hi", "text": text}).json()["error"]
    assert error["param"] == "text.format.schema"
    assert "not" in error["message"]


def test_log_probabilities_beside_calls_are_refused() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await server.client.post(PATH, json={**GREEDY, **SCORED, "tools": [WEATHER]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "include")

    hear_everything(check)
