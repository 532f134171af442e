"""Waiting that is told in a stream, message by message."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from api import progress
from api.answers import Answers
from api.events import EVENT_STREAM
from backend.tokenizer import ByteTokenizer
from engine.live_request import LiveRequest
from engine.multi_device import EnginePool
from tests.api.asgi_client import Client, Lines, play, streaming, turns
from tests.api.hand_fed import BROKEN, LENGTH, HandFedPool, ask


class Events(Lines):
    media_type = EVENT_STREAM


class Queue(HandFedPool):
    """A pool in which everybody waits at `place`."""

    place: tuple[int, float] | None = (3, 1.25)

    def place_of(self, request: LiveRequest) -> tuple[int, float] | None:
        return self.place


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look in each turn of the loop."""
    monkeypatch.setattr(progress, "PERIOD_S", 0)


def opened(pool: HandFedPool, *, asked: bool = True, n: int = 1) -> Answers:
    answers = Answers("gen-1", cast(EnginePool, pool), progress=asked)
    answers.open([ask(n=n)], ByteTokenizer(), owner="somebody", default_length=16)
    return answers


def test_changes_of_place_and_prompt_are_told_until_the_first_piece() -> None:
    async def scenario() -> None:
        pool, client = Queue(), Client()
        work = streaming(opened(pool), client, Events())
        await asyncio.sleep(0.01)
        pool.place = (1, 0.5)
        await asyncio.sleep(0.01)
        pool.place = None
        await asyncio.sleep(0.01)
        pool.requests[0].prefilled = 2
        await asyncio.sleep(0.01)
        pool.feed(0, b"a")
        await asyncio.sleep(0.01)
        pool.requests[0].prefilled = 3
        pool.feed(0, b"b", LENGTH)
        await work
        assert client.status == 200
        assert client.body == [
            b": queued position=3 est_wait=1.2\n\n",
            b": queued position=1 est_wait=0.5\n\n",
            b": prefill 0/3\n\n",
            b": prefill 2/3\n\n",
            b"0:a\n",
            b"0:b (length)\n",
            b"end\n",
        ]
        assert client.complete

    play(scenario())


@pytest.mark.parametrize(("asked", "frames"), [(False, Events()), (True, Lines())])
def test_nothing_is_told_to_who_does_not_ask_nor_in_other_streams(
    asked: bool, frames: Lines
) -> None:
    async def scenario() -> None:
        pool, client = Queue(), Client()
        work = streaming(opened(pool, asked=asked), client, frames)
        await turns()
        assert client.sent == []
        pool.feed(0, b"a", LENGTH)
        await work
        assert client.body == [b"0:a (length)\n", b"end\n"]

    play(scenario())


def test_a_failure_after_a_comment_ends_the_stream_in_its_own_words() -> None:
    async def scenario() -> None:
        pool, client = Queue(), Client()
        work = streaming(opened(pool), client, Events())
        await asyncio.sleep(0.01)
        pool.feed(0, b"", BROKEN)
        await work
        assert client.status == 200
        assert client.body[1:] == [f"0! 503 {BROKEN.message}\n".encode(), b"end\n"]

    play(scenario())


def test_a_client_that_leaves_while_it_waits_ends_its_answers() -> None:
    async def scenario() -> None:
        pool, client = Queue(), Client()
        work = streaming(opened(pool, n=2), client, Events())
        await asyncio.sleep(0.01)
        client.gone.set()
        await work
        assert pool.going == 0

    play(scenario())
