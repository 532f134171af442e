"""What is kept of responses, for those who ask for it, and what a next turn makes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from api import responses
from api.auth import ApiKeyMiddleware, Keys
from tests.api.in_process import Server, refusal, serve
from tests.api.official_clients import openai_of
from tests.api.responses_bench import PATH, WEATHER, events_of, hear_everything, run
from tests.api.test_chat import seen_by_the_model

GREEDY: dict[str, Any] = {"model": "fake", "temperature": 0, "max_output_tokens": 5}
ITEM: TypeAdapter[ResponseItem] = TypeAdapter(ResponseItem)


def test_a_stored_response_is_there_until_it_is_deleted() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        answer = await client.responses.create(**GREEDY, input="hi", store=True)
        assert (await client.responses.retrieve(answer.id)) == answer
        await client.responses.delete(answer.id)
        for asked in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.NotFoundError):
                await asked(answer.id)

    run(check)


def test_a_response_that_nobody_asked_to_keep_is_not_kept() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        for more in ({}, {"store": False}, {"store": None}):
            answer = await client.responses.create(**GREEDY, input="hi", **more)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(answer.id)
        assert len(server.service.responses) == 0

    run(check)


def test_a_streamed_response_is_kept_as_its_last_event_has_it() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        body = {**GREEDY, "input": "hi", "store": True, "stream": True}
        last = events_of((await server.client.post(PATH, json=body)).text)[-1]["response"]
        kept = await server.client.get(f"{PATH}/{last['id']}")
        assert kept.json() == last

    run(check)


def test_a_next_turn_continues_the_conversation_without_its_instructions() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        first = await client.responses.create(
            **GREEDY, input="hi", instructions="Rhyme", store=True
        )
        second = await client.responses.create(
            **GREEDY, input="more", previous_response_id=first.id, store=True
        )
        assert second.previous_response_id == first.id
        await client.responses.delete(first.id)
        said = [first.output_text, second.output_text]
        third = {"input": "again", "previous_response_id": second.id}
        await client.responses.create(**GREEDY, **third)
        by_hand = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": said[0]},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": said[1]},
            {"role": "user", "content": "again"},
        ]
        continued = seen_by_the_model(server)
        await client.responses.create(**GREEDY, input=by_hand)  # type: ignore[arg-type]
        assert continued == seen_by_the_model(server)
        assert "Rhyme" not in continued

    run(check)


def test_a_call_and_its_output_are_continued() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        call = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
        first: Any = [{"role": "user", "content": "hi"}, call]
        kept = await client.responses.create(**GREEDY, input=first, store=True)
        more: Any = {"input": [output], "previous_response_id": kept.id, "tools": [WEATHER]}
        assert (await client.responses.create(**GREEDY, **more)).output_text
        refused = await server.client.post(PATH, json={"input": [output]})
        assert refusal(refused) == (400, "input.0.call_id")

    run(check)


def test_input_items_are_listed_page_by_page() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        turns: Any = [{"role": "user", "content": f"turn {number}"} for number in range(7)]
        first = await client.responses.create(**GREEDY, input=turns, store=True)
        second = await client.responses.create(
            **GREEDY, input="last", previous_response_id=first.id, store=True
        )
        listed = [item async for item in client.responses.input_items.list(second.id, limit=3)]
        texts = [item.to_dict()["content"][0]["text"] for item in listed]  # type: ignore[index]
        asked = [f"turn {number}" for number in range(7)]
        assert texts == [*asked, first.output_text, "last"][::-1]
        ascending = await client.responses.input_items.list(second.id, order="asc")
        assert [item.to_dict() for item in ascending.data] == [each.to_dict() for each in listed][
            ::-1
        ]
        for item in ascending.data:
            ITEM.validate_python(item.to_dict())

    run(check)


def test_items_of_every_kind_are_listed_as_the_clients_types() -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        heard = await client.responses.create(
            **(GREEDY | {"max_output_tokens": 9}), input="hi", store=True, tools=[WEATHER]
        )
        made = [item.to_dict() for item in heard.output if item.type == "function_call"]
        again = [
            {"type": "item_reference", "id": heard.output[0].id},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [TEXT]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "yes"}]},
        ]
        assert len(made) == 1
        body = {**GREEDY, "input": again, "store": True, "tools": [WEATHER]}
        kept = (await server.client.post(PATH, json=body)).json()
        listed = (await server.client.get(f"{PATH}/{kept['id']}/input_items?order=asc")).json()
        assert [ITEM.validate_python(item).type for item in listed["data"]] == [
            "reasoning",
            "function_call",
            "function_call_output",
            "reasoning",
            "message",
        ]
        assert listed["data"][0] == heard.output[0].to_dict()

    hear_everything(check)


TEXT = {"type": "input_text", "text": "sunny"}


def test_another_keys_responses_do_not_exist() -> None:
    async def check() -> None:
        async with serve(responses.router, API_KEY="mine,yours") as server:
            keys = Keys.of(server.service.settings.server)
            server.app.add_middleware(ApiKeyMiddleware, keys=keys)
            async with openai_of(server, "mine") as me, openai_of(server, "yours") as you:
                kept = await me.responses.create(**GREEDY, input="hi", store=True)
                for asked in (
                    you.responses.retrieve(kept.id),
                    you.responses.delete(kept.id),
                    you.responses.cancel(kept.id),
                    you.responses.input_items.list(kept.id)._get_page(),
                ):
                    with pytest.raises(openai.NotFoundError):
                        await asked
                reference: Any = [{"type": "item_reference", "id": kept.output[0].id}]
                for more in (
                    {"previous_response_id": kept.id, "input": "hi"},
                    {"input": reference},
                ):
                    with pytest.raises(openai.BadRequestError):
                        await you.responses.create(**GREEDY, **more)
                assert (await me.responses.retrieve(kept.id)) == kept

    asyncio.run(check())


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("POST", "/cancel", "response_id"),
        ("GET", "?stream=true", "stream"),
        ("GET", "?include[]=message.output_text.logprobs", "include[]"),
        ("GET", "?starting_after=3", "starting_after"),
        ("GET", "/input_items?limit=0", "limit"),
        ("GET", "/input_items?limit=many", "limit"),
        ("GET", "/input_items?order=up", "order"),
        ("GET", "/input_items?after=nobody", "after"),
    ],
)
def test_what_is_not_served_about_a_stored_response_is_refused(
    method: str, path: str, param: str
) -> None:
    async def check(server: Server, client: AsyncOpenAI) -> None:
        kept = await client.responses.create(**GREEDY, input="hi", store=True)
        answer = await server.client.request(method, f"{PATH}/{kept.id}{path}")
        assert refusal(answer) == (400, param)

    run(check)
