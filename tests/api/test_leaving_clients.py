"""What becomes of answers that nobody waits for any more: the client has left, the server exits."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.types import Message

from api.answers import ABANDONED, Answers
from api.errors import ClientGone
from backend.interface import BackendFailed
from tests.api.asgi_client import (
    TURNS,
    Client,
    app_over,
    folding,
    play,
    scope,
    served,
    streaming,
    turns,
)
from tests.api.hand_fed import BROKEN, LENGTH, HandFedPool, ask, opened


@pytest.fixture(autouse=True)
def nothing_goes_unnoticed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No task dies of an error that nobody hears of."""
    yield
    gc.collect(1)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


Handler = Callable[[Answers, Client], "asyncio.Task[Any]"]

streamed_or_whole = pytest.mark.parametrize("handler", [streaming, folding])


@streamed_or_whole
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_client_that_leaves_ends_what_goes_on_at_once(handler: Handler, pieces: int) -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = handler(opened(pool, ask(n=3)), client)
        await turns()
        if pieces:
            pool.feed(1, b"b", LENGTH)
        for _ in range(pieces):
            pool.feed(0, b"a")
            await turns()
        client.gone.set()
        await turns()
        assert work.done()
        assert pool.going == 0
        assert pool.ended == [(i, ABANDONED) for i in range(3) if not (pieces and i == 1)]
        sent = len(client.sent)
        await asyncio.wait([work])
        assert isinstance(work.exception(), ClientGone if handler is folding else type(None))
        await turns()
        assert len(client.sent) == sent

    play(scenario())


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_client_that_does_not_read_may_leave_too(sent: int) -> None:
    """Before the status, before the first part of the body, or before the next."""

    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        send = client.send

        async def stalls(message: Message) -> None:
            if len(client.sent) == sent:
                client.reads.clear()
            await send(message)

        client.send = stalls  # type: ignore[method-assign]
        work = streaming(opened(pool, ask()), client)
        for _ in range(3):
            pool.feed(0, b"a")
            await turns()
        assert (len(client.sent), work.done()) == (sent, False)
        client.gone.set()
        await turns()
        assert work.done()
        assert pool.ended == [(0, ABANDONED)]
        await work

    play(scenario())


@streamed_or_whole
def test_a_client_may_leave_in_the_moment_of_the_last_token(
    handler: Handler,
) -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = handler(opened(pool, ask()), client)
        await turns()
        pool.feed(0, b"a", LENGTH)
        client.gone.set()
        await asyncio.wait([work])
        assert isinstance(work.exception(), ClientGone | None)
        assert pool.ended == []

    play(scenario())


@streamed_or_whole
@pytest.mark.parametrize("head_start", range(TURNS))
def test_a_client_may_leave_around_the_moment_of_a_failure(
    handler: Handler, head_start: int
) -> None:
    """Whichever is noticed first, the other goes unnoticed and nothing is left."""

    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = handler(opened(pool, ask(n=2)), client)
        await turns()
        client.gone.set()
        for _ in range(head_start):
            await asyncio.sleep(0)
        pool.feed(0, b"a", BROKEN)
        await asyncio.wait([work])
        assert isinstance(work.exception(), ClientGone | BackendFailed | None)
        assert pool.going == 0

    play(scenario())


@streamed_or_whole
@pytest.mark.parametrize("head_start", range(TURNS))
def test_a_server_that_is_forced_to_exit_ends_what_goes_on(
    handler: Handler, head_start: int
) -> None:
    """Its handlers are cancelled, just before or just after an engine fails."""

    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = handler(opened(pool, ask(n=2)), client)
        await turns()
        pool.feed(0, b"a", BROKEN)
        for _ in range(head_start):
            await asyncio.sleep(0)
        cancelled = work.cancel()
        await asyncio.wait([work])
        assert work.cancelled() == cancelled
        assert pool.going == 0

    play(scenario())


def test_a_slow_clients_stream_can_be_cancelled() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        client.reads.clear()
        work = streaming(opened(pool, ask()), client)
        pool.feed(0, b"a")
        await turns()
        work.cancel()
        await asyncio.wait([work])
        assert work.cancelled()
        assert pool.ended == [(0, ABANDONED)]

    play(scenario())


@pytest.mark.parametrize("whole", [True, False])
def test_a_client_that_leaves_a_route_ends_its_answer(whole: bool) -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        app = app_over(pool, whole=whole)
        work = served(app(scope(), client.receive, client.send))
        await turns()
        pool.feed(0, b"a")
        await turns()
        client.gone.set()
        await work
        assert pool.ended == [(0, ABANDONED)]
        if whole:  # nobody reads it, but a server must be told something
            assert (client.status, client.complete) == (499, True)

    play(scenario())
