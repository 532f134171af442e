"""A client as a server shows it to an app, and a server at work on answers, message by message."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from fastapi import APIRouter, BackgroundTasks, FastAPI, Request
from starlette.responses import Response
from starlette.types import Message, Scope

from api.answers import Answer, Answers, Piece, Whole
from api.errors import ApiError
from api.service import Service
from api.streaming import AnswerStream, fold
from tests.api.hand_fed import HandFedPool, ask, opened
from tests.api.in_process import application

Result = TypeVar("Result")

TURNS = 10  # of the event loop: enough for whatever is done at once


def scope() -> Scope:
    return {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}


class Client:
    """One client as a server shows it: what it was sent, whether it reads, when it leaves."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self._body: list[Message] = [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.request", "body": b"}", "more_body": False},
        ]

    async def receive(self) -> Message:
        if self._body:
            return self._body.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return cast(int, self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> list[bytes]:
        """Message by message."""
        return [message["body"] for message in self.sent[1:]]

    @property
    def complete(self) -> bool:
        """Whether the answer has come to its end. Nothing may come after it."""
        assert [message["type"] for message in self.sent[:1]] == ["http.response.start"]
        assert {message["type"] for message in self.sent[1:]} <= {"http.response.body"}
        ends = [not message.get("more_body", False) for message in self.sent[1:]]
        assert not any(ends[:-1])
        return ends[-1:] == [True]


class Lines:
    """Frames that are easy to read."""

    media_type = "text/plain"

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        if not piece.text and piece.finish is None:
            return b""
        finish = "" if piece.finish is None else f" ({piece.finish.reason})"
        return f"{answer.index}:{piece.text}{finish}\n".encode()

    def failure(self, answer: Answer, error: ApiError) -> bytes:
        return f"{answer.index}! {error.status} {error.message}\n".encode()

    def end(self) -> bytes:
        return b"end\n"


def play(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 10))


async def turns() -> None:
    """Let the others work for as long as they need when nothing is in their way."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def served(handler: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """A server at work. No task may outlive the handler, not even one that is about to end."""

    async def work() -> Result:
        others = asyncio.all_tasks()
        try:
            return await handler
        finally:
            assert asyncio.all_tasks() <= others

    return asyncio.ensure_future(work())


def streaming(answers: Answers, client: Client, frames: Lines | None = None) -> asyncio.Task[None]:
    """A server at work on a stream."""
    stream = AnswerStream(answers, frames or Lines())
    return served(stream(scope(), client.receive, client.send))


def folding(answers: Answers, client: Client) -> asyncio.Task[list[Whole]]:
    """A server at work on whole answers."""
    return served(fold(Request(scope(), client.receive), answers))


def app_over(pool: HandFedPool, *, whole: bool) -> FastAPI:
    """An app with one route, that answers a prompt."""
    router = APIRouter()

    @router.post("/")
    async def route(request: Request, tasks: BackgroundTasks, response: Response) -> Response:
        answers = opened(pool, ask())
        if whole:
            [answer] = await fold(request, answers)
            return Response(answer.text)
        return AnswerStream(answers, Lines())

    return application(cast(Service, None), router)
