"""What the tests of OpenAI's routes share: a server, the official client, a reader of streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import httpx
from openai import AsyncOpenAI

from api import chat, completions, models
from backend.interface import Finish
from engine.live_request import LiveRequest
from tests.api.in_process import Server, serve
from tests.api.official_clients import openai_of

Check: TypeAlias = Callable[[Server, AsyncOpenAI], Awaitable[None]]


def run(check: Check, **flags: object) -> None:
    """Run `check` with a server under `flags`, and the official client pointed at it."""

    async def connected() -> None:
        routers = (completions.router, chat.router, models.router)
        async with serve(*routers, **flags) as server, openai_of(server) as client:
            await check(server, client)

    asyncio.run(connected())


def post(path: str, body: object, **flags: object) -> httpx.Response:
    """The answer to one request; `body` is JSON, or the bytes themselves."""
    responses = []

    async def check(server: Server, _: AsyncOpenAI) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        responses.append(await server.client.post(path, content=content))

    run(check, **flags)
    return responses[0]


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a stream, which ends as OpenAI's do."""
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def lose_the_device(server: Server, after: int) -> None:
    """Let every request fail once it has `after` tokens, as it does when its engine is lost."""
    submit = server.pool.submit

    def failing(notify: Callable[[LiveRequest], None]) -> Callable[[LiveRequest], None]:
        def told(live: LiveRequest) -> None:
            if len(live.received) >= after:
                server.pool.end(live, Finish("error", message="the device is lost"))
            notify(live)

        return told

    def submitted(requests: Sequence[LiveRequest]) -> list[str]:
        for request in requests:
            request.notify = failing(request.notify)
        return submit(requests)

    server.pool.submit = submitted  # type: ignore[method-assign]


def text_of(server: Server, index: int = -1) -> str:
    """The text that the engine's tokens spell, for a request that no stop string ended."""
    tokenizer = server.service.model.tokenizer
    return b"".join(tokenizer.visible[id] for id in server.pool.submitted[index].received).decode()


def refusal(response: httpx.Response) -> tuple[int, str | None]:
    """The status of an error and the field it names; its form is checked."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert "Traceback" not in error["message"]
    return response.status_code, error["param"]
