"""How answers leave: raw ASGI messages from prepared bytes, and an eye on the client meanwhile.

A client that leaves is noticed by `receive`, not by a failed send, and its answers are ended at
once, streamed or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.answers import Answer, Answers, Piece, Whole
from api.errors import ApiError, ClientGone, api_error
from api.events import EVENT_STREAM
from api.progress import first_pieces

Result = TypeVar("Result")


class Frames(Protocol):
    """The bytes of one stream, in the manner of one API. Made for one request."""

    @property
    def media_type(self) -> str:
        """Of the whole stream."""

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        """A piece, and with its last one the end of the answer. Empty bytes are not sent."""

    def failure(self, answer: Answer, error: ApiError) -> bytes:
        """The end of an answer whose engine failed, after the first byte."""

    def end(self) -> bytes:
        """What follows the last answer; may be empty."""


async def until_gone(receive: Receive) -> None:
    """Return when the client has left. The body has been read already."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Raises ClientGone, with `work` cancelled, when the client leaves."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)  # neither outlives the request


async def fold(request: Request, answers: Answers) -> list[Whole]:
    """Every answer, whole. Raises BackendFailed, and ClientGone when nobody waits any more."""
    try:
        return await unless_gone(request.receive, answers.whole())
    finally:
        answers.close()


class AnswerStream(Response):
    """Answers, piece by piece.

    The status waits for the first piece: an engine that fails before it is a 503, not a stream.
    Where progress is told it does not wait, and such a failure is the stream's.
    """

    def __init__(
        self, answers: Answers, frames: Frames, headers: Mapping[str, str] | None = None
    ) -> None:
        """`headers` are lower case, and come beside those of every stream."""
        self.answers = answers
        self.frames = frames
        self.background = None
        self._more = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._stream(scope, receive, send))
        except ClientGone:
            pass
        finally:
            self.answers.close()

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.answers.progress and self.frames.media_type == EVENT_STREAM:
            await self._start(send)
            pieces = await self._first_pieces(send)
        else:
            pieces = await self.answers.pieces()
            for _, piece in pieces:
                if piece.error is not None:
                    await api_error(piece.error).response(scope)(scope, receive, send)
                    return
            await self._start(send)
        while pieces:
            frame = b"".join([self._frame(answer, piece) for answer, piece in pieces])
            if frame:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            pieces = await self.answers.pieces()
        await send({"type": "http.response.body", "body": self.frames.end()})

    async def _first_pieces(self, send: Send) -> list[tuple[Answer, Piece]]:
        async def tell(comment: bytes) -> None:
            await send({"type": "http.response.body", "body": comment, "more_body": True})

        return await first_pieces(self.answers, tell)

    async def _start(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        headers = [
            (b"content-type", self.frames.media_type.encode()),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
            *self._more,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    def _frame(self, answer: Answer, piece: Piece) -> bytes:
        if piece.error is None:
            return self.frames.frame(answer, piece)
        before = self.frames.frame(answer, replace(piece, finish=None))
        return before + self.frames.failure(answer, api_error(piece.error))
