"""How answers leave, message by message: what is sent, and what fails."""

from __future__ import annotations

import json

import pytest
from starlette.types import Message

from api.answers import ABANDONED, Answer, Piece
from backend.interface import BackendFailed, Finish
from tests.api.asgi_client import (
    Client,
    Lines,
    app_over,
    folding,
    play,
    scope,
    served,
    streaming,
    turns,
)
from tests.api.hand_fed import BROKEN, LENGTH, HandFedPool, ask, opened

STOPPED = Finish("stop", matched="ST")
FAILURE = f"0! 503 {BROKEN.message}\n".encode()


# What is sent


def test_a_stream_is_a_start_a_body_for_each_news_and_an_end() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask()), client)
        for tokens, finish in ((b"one ", None), (b"two", None), (b"!", LENGTH)):
            pool.feed(0, tokens, finish)
            await turns()
        await work
        assert client.status == 200
        assert client.headers == {
            b"content-type": b"text/plain",
            b"cache-control": b"no-cache",
            b"x-accel-buffering": b"no",
        }
        assert client.body == [b"0:one \n", b"0:two\n", b"0:! (length)\n", b"end\n"]
        assert client.complete
        assert pool.ended == []

    play(scenario())


def test_nothing_is_sent_before_the_first_piece() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask()), client)
        await turns()
        assert client.sent == []
        pool.feed(0, b"a")
        await turns()
        assert (client.status, client.body) == (200, [b"0:a\n"])
        pool.feed(0, b"", LENGTH)
        await work

    play(scenario())


def test_pieces_that_say_nothing_are_not_sent() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask("STOP")), client)
        for tokens, finish in ((b"S", None), (b"T", None), (b"", LENGTH)):
            pool.feed(0, tokens, finish)
            await turns()
        await work
        assert client.body == [b"0:ST (length)\n", b"end\n"]

    play(scenario())


def test_news_of_several_answers_leave_in_one_message() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask(n=2), ask("ST")), client)
        pool.feed(2, b"c")
        pool.feed(0, b"a")
        await turns()
        pool.feed(1, b"b", LENGTH)
        pool.feed(2, b"STop")
        await turns()
        pool.feed(0, b"", LENGTH)
        await work
        assert client.body == [
            b"2:c\n0:a\n",
            b"1:b (length)\n2: (stop)\n",
            b"0: (length)\n",
            b"end\n",
        ]
        assert pool.ended == [(2, STOPPED)]

    play(scenario())


def test_a_slow_client_gets_the_tokens_that_came_meanwhile_in_one_message() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask("ST")), client)
        pool.feed(0, b"a")
        await turns()
        client.reads.clear()
        for _ in range(100):
            pool.feed(0, b"b")
            await turns()
        client.reads.set()
        await turns()
        assert client.body[0] == b"0:a\n"
        assert b"".join(client.body).count(b"b") == 100
        assert len(client.body) == 3  # one was on its way, the rest came in one
        pool.feed(0, b"ST")
        await work
        assert client.complete

    play(scenario())


def test_whole_answers_come_in_order_of_their_index() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = folding(opened(pool, ask("ST", n=2)), client)
        pool.feed(1, b"bST")
        await turns()
        pool.feed(0, b"a", LENGTH)
        assert [(each.text, each.finish) for each in await work] == [("a", LENGTH), ("b", STOPPED)]

    play(scenario())


# What fails


def test_an_engine_that_fails_before_the_first_byte_is_a_503_and_ends_the_siblings() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask(n=3)), client)
        pool.feed(0, b"a")
        pool.feed(1, b"b", BROKEN)
        await work
        assert (client.status, client.complete) == (503, True)
        assert client.headers[b"content-type"] == b"application/json"
        error = json.loads(b"".join(client.body))["error"]
        assert (error["message"], error["code"]) == (BROKEN.message, "engine_failed")
        assert pool.ended == [(0, ABANDONED), (2, ABANDONED)]

    play(scenario())


def test_an_engine_that_fails_later_is_the_last_line_of_a_stream_that_ends() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask()), client)
        pool.feed(0, b"a")
        await turns()
        pool.feed(0, b"", BROKEN)
        await work
        assert (client.status, client.complete) == (200, True)
        assert b"".join(client.body).endswith(FAILURE + b"end\n")
        assert pool.ended == []

    play(scenario())


def test_what_came_before_a_failure_reaches_a_client_that_is_slow_too() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask("STOP")), client)
        pool.feed(0, b"a")
        await turns()
        client.reads.clear()
        for tokens, finish in ((b"b", None), (b"c", None), (b"dST", BROKEN)):
            pool.feed(0, tokens, finish)
            await turns()
        client.reads.set()
        await work
        assert b"".join(client.body) == b"0:a\n0:b\n0:cdST\n" + FAILURE + b"end\n"

    play(scenario())


def test_an_answer_whose_engine_failed_leaves_the_others_alone() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask(n=2)), client)
        pool.feed(1, b"a")
        await turns()
        pool.feed(0, b"", BROKEN)
        await turns()
        pool.feed(1, b"b", LENGTH)
        await work
        lines = b"".join(client.body).splitlines(keepends=True)
        assert [lines[0], *lines[-3:]] == [b"1:a\n", FAILURE, b"1:b (length)\n", b"end\n"]
        assert client.complete

    play(scenario())


def test_whole_answers_of_which_one_fails_are_an_error_and_the_others_end() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = folding(opened(pool, ask(n=2)), client)
        pool.feed(1, b"a", BROKEN)
        with pytest.raises(BackendFailed, match="out of luck"):
            await work
        assert pool.ended == [(0, ABANDONED)]

    play(scenario())


class Wrong(Lines):
    """Frames with a defect."""

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        raise ZeroDivisionError


def test_a_defect_in_the_frames_is_heard_of_and_ends_the_answers() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        work = streaming(opened(pool, ask(n=2)), client, Wrong())
        pool.feed(0, b"a")
        with pytest.raises(ZeroDivisionError):
            await work
        assert pool.ended == [(0, ABANDONED), (1, ABANDONED)]

    play(scenario())


def test_a_server_that_cannot_send_ends_the_answers() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()

        async def send(message: Message) -> None:
            raise OSError("the connection is gone")

        client.send = send  # type: ignore[method-assign]
        work = streaming(opened(pool, ask()), client)
        pool.feed(0, b"a")
        with pytest.raises(OSError, match="is gone"):
            await work
        assert pool.ended == [(0, ABANDONED)]

    play(scenario())


# As the handlers of an app


def test_a_stream_is_what_a_route_may_return() -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        app = app_over(pool, whole=False)
        work = served(app(scope(), client.receive, client.send))
        await turns()
        assert client.sent == []
        pool.feed(0, b"a")
        await turns()
        assert (client.status, client.body) == (200, [b"0:a\n"])
        assert client.headers[b"content-type"] == b"text/plain"
        assert b"content-length" not in client.headers
        pool.feed(0, b"b", LENGTH)
        await work
        assert client.body == [b"0:a\n", b"0:b (length)\n", b"end\n"]
        assert client.complete

    play(scenario())


@pytest.mark.parametrize("whole", [True, False])
def test_an_engine_that_fails_at_once_is_the_same_answer_of_a_route_streamed_or_whole(
    whole: bool,
) -> None:
    async def scenario() -> None:
        pool, client = HandFedPool(), Client()
        app = app_over(pool, whole=whole)
        work = served(app(scope(), client.receive, client.send))
        await turns()
        pool.feed(0, b"a", BROKEN)
        await work
        assert (client.status, client.complete) == (503, True)
        error = json.loads(b"".join(client.body))["error"]
        assert (error["message"], error["code"]) == (BROKEN.message, "engine_failed")

    play(scenario())
