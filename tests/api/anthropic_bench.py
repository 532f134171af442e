"""What the tests of Anthropic's routes share: a server, the client, a reader of streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import httpx
from anthropic import AsyncAnthropic

from api import anthropic_routes
from tests.api import in_process
from tests.api.in_process import Server, serve
from tests.api.official_clients import anthropic_of

Check: TypeAlias = Callable[[Server, AsyncAnthropic], Awaitable[None]]

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story"}]
BODY: dict[str, Any] = {"model": "fake", "max_tokens": 24, "messages": MESSAGES}


def run(check: Check, **flags: object) -> None:
    """Run `check` with a server under `flags`, and the official client pointed at it."""

    async def connected() -> None:
        router = anthropic_routes.router
        async with serve(router, **flags) as server, anthropic_of(server) as client:
            await check(server, client)

    asyncio.run(connected())


def post(body: object, path: str = PATH, **flags: object) -> httpx.Response:
    """The answer to one request; `body` is JSON, or the bytes themselves."""
    return in_process.post(anthropic_routes.router, path, body, **flags)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream. Each is named as its content says."""
    *found, rest = text.split("\n\n")
    assert rest == ""
    contents = []
    for each in found:
        name, data = each.split("\n")
        contents.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {contents[-1]['type']}"
    return contents


def refusal(response: httpx.Response) -> tuple[int, str]:
    """The status of an error and its message; its form is checked."""
    content = response.json()
    assert content.keys() == {"type", "error", "request_id"}
    assert content["type"] == "error"
    assert content["request_id"] == response.headers["request-id"]
    assert content["error"].keys() == {"type", "message"}
    assert "Traceback" not in content["error"]["message"]
    return response.status_code, content["error"]["message"]
