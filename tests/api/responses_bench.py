"""What the tests of `/v1/responses` share: a server, the official client, an ear that hears things.

The fake model says letters; `hear_everything` lets them mean thoughts, words and calls by their
place in the answer, wherever its pieces are cut.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias
from unittest.mock import patch

import httpx
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from api import responses
from api.hearing import Ear, Hearing, Wish
from api.service import Service
from api.speech import CallArguments, CallStart, Saying, Words
from tests.api.in_process import Server, serve
from tests.api.official_clients import openai_of

PATH = "/v1/responses"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}

GREEDY: dict[str, Any] = {"model": "fake", "input": "Tell me a story", "temperature": 0}
SEEDED: dict[str, Any] = {"model": "fake", "input": "Tell me a story", "seed": 5}
SCORED: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}

Check: TypeAlias = Callable[[Server, AsyncOpenAI], Awaitable[None]]


def run(check: Check, **flags: object) -> None:
    """Run `check` with a server under `flags`, and the official client pointed at it."""

    async def connected() -> None:
        async with serve(responses.router, **flags) as server, openai_of(server) as client:
            await check(server, client)

    asyncio.run(connected())


def post(body: object, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """The answer of a fresh server to one request."""
    answers = []

    async def check(server: Server, _: AsyncOpenAI) -> None:
        answers.append(await server.client.post(PATH, json=body, headers=headers))

    run(check)
    return answers[0]


def events_of(stream: str) -> list[dict[str, Any]]:
    """The events of a stream. Each is one of the client's types, and they count themselves."""
    *frames, rest = stream.split("\n\n")
    assert rest == ""
    events = []
    for number, frame in enumerate(frames):
        name, data = frame.split("\n")
        event: dict[str, Any] = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        assert EVENT.validate_python(event).type == event["type"]
        events.append(event)
    return events


def nameless(response: Mapping[str, Any]) -> Any:
    """A response without what no two have in common: names and times."""
    Response.model_validate(response)
    text = json.dumps(response).replace(response["id"].removeprefix("resp_"), "")
    return {**json.loads(text), "created_at": 0, "completed_at": bool(response["completed_at"])}


class ByPlace:
    """Reads the letters of an answer by their place: three of each kind."""

    def __init__(self) -> None:
        self._place = 0

    def feed(self, text: str) -> Sequence[Saying]:
        return [saying for letter in text for saying in self._letter(letter)]

    def end(self) -> Sequence[Saying]:
        return []

    def _letter(self, letter: str) -> list[Saying]:
        place, self._place = self._place, self._place + 1
        if place < 6:
            return [Words(letter, thought=place < 3)]
        call, first = divmod(place - 6, 3)
        start: list[Saying] = [] if first else [CallStart(call, f"call_{call}", "weather")]
        return [*start, CallArguments(call, letter)]


def hear_everything(check: Check, **flags: object) -> list[Wish]:
    """Run `check`, answers heard by `ByPlace`. Returns the wishes that came."""
    wishes = []

    async def listen(_: Service, __: Sequence[int], wish: Wish) -> Hearing:
        wishes.append(wish)
        return Hearing(plain=False, ears=lambda: Ear(ByPlace()))

    with patch.object(responses, "listen", listen):
        run(check, **flags)
    return wishes
