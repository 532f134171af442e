"""A chat with a server on a real socket that does what the test says."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import SecretStr

from backend.interface import EngineError, RequestRefused, SamplingParams, Unavailable
from bench.chat import Counts, Piece, RemoteChat
from bench.http_connection import Address, key_of
from bench.server_process import free_port
from config import ServerSettings
from tests.bench.scripted_server import Script, ScriptedServer, chat, events, serving, stream, whole

HELLO = [{"role": "user", "content": "hello"}]
SAMPLING = SamplingParams(temperature=0.5, max_new_tokens=7)
ONE = {"choices": [{"index": 0, "delta": {"content": "one"}, "finish_reason": None}]}
FAILURE = {"error": {"message": "the engine was lost", "type": "engine_error"}}
REFUSAL = b'{"error": {"message": "two\\nlines"}}'


def ask(*scripts: Script) -> tuple[list[Piece], EngineError | None, ScriptedServer]:
    """What comes of one question: the pieces, the error after them, and what the server saw."""

    async def run() -> tuple[list[Piece], EngineError | None, ScriptedServer]:
        async with serving(*scripts) as server:
            remote = RemoteChat(Address(server.url, "secret"), "small", SAMPLING)
            pieces: list[Piece] = []

            def listen() -> EngineError | None:
                try:
                    pieces.extend(remote.stream(HELLO, 3))
                except EngineError as error:
                    return error
                return None

            return pieces, await asyncio.to_thread(listen), server

    return asyncio.run(run())


def test_a_question_says_all_that_was_chosen_and_asks_for_counts() -> None:
    _, error, server = ask(stream(*chat(["a"], 1)))
    assert error is None
    assert server.paths == ["/v1/chat/completions"]
    assert "Authorization: Bearer secret\r\n" in server.heads[0]
    assert server.bodies == [
        {
            "model": "small",
            "messages": HELLO,
            "max_tokens": 7,
            "temperature": 0.5,
            "seed": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_an_answer_has_its_text_its_ending_and_its_counts() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2}
    cached = {**usage, "prompt_tokens_details": {"cached_tokens": 4}}
    *said, done = chat(["a", "b"], 2)
    for told, count in ((usage, 0), (cached, 4)):
        counts = events({"choices": [], "usage": told})[0]
        pieces, error, _ = ask(stream(b": a comment\n\n", *said[:-1], counts, done))
        assert error is None
        assert "".join(piece.text for piece in pieces) == "ab"
        assert [piece.finish for piece in pieces if piece.finish] == ["stop"]
        assert pieces[-1].counts == Counts(prompt=9, cached=count, answer=2)


def test_a_piece_is_there_before_the_answer_has_ended() -> None:
    first, *rest = chat(["a"], 1)

    async def run() -> list[Piece]:
        heard = asyncio.Event()

        async def script(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + first)
            await heard.wait()
            writer.write(b"".join(rest))
            writer.close()

        async with serving(script) as server:
            pieces = RemoteChat(Address(server.url), "small", SAMPLING).stream(HELLO, None)
            begun = await asyncio.to_thread(next, pieces)
            heard.set()
            return [begun, *await asyncio.to_thread(list, pieces)]

    assert "".join(piece.text for piece in asyncio.run(run())) == "a"


@pytest.mark.parametrize(
    ("script", "kind", "says"),
    [
        (whole("400 Bad Request", REFUSAL), RequestRefused, "two lines"),
        (whole("413 Too Large", b"<html>"), RequestRefused, "<html>"),
        (whole("429 Too Many Requests", REFUSAL), Unavailable, "answers 429: two lines"),
        (whole("503 Service Unavailable", b""), Unavailable, "answers 503: Service Unavailable"),
        (whole("500 Oh", b'{"error": "bad"}'), Unavailable, 'answers 500: {"error": "bad"}'),
        (whole("nonsense", b""), Unavailable, "no server answers at http://127.0.0.1:"),
    ],
)
def test_a_refusal_is_one_line_of_the_servers_own(
    script: Script, kind: type[EngineError], says: str
) -> None:
    pieces, error, _ = ask(script)
    assert pieces == []
    assert type(error) is kind
    assert says in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("frames", "complete", "says"),
    [
        (events(ONE)[:-1], True, "the answer was cut off"),
        (events(ONE)[:-1], False, "the answer was cut off"),
        (events(ONE, FAILURE), True, "the answer failed: the engine was lost"),
        ([*events(ONE)[:-1], b"data: {oops\n\n"], True, "broken frame: {oops"),
        (events(ONE, [1]), True, "broken frame: [1]"),
        (events(ONE, {"error": "bad"}), True, 'broken frame: {"error": "bad"}'),
        (events(ONE, {"choices": [], "usage": {"total": 1}}), True, "broken frame"),
    ],
)
def test_an_answer_that_breaks_off_says_so_after_what_had_come(
    frames: list[bytes], complete: bool, says: str
) -> None:
    pieces, error, _ = ask(stream(*frames, complete=complete))
    assert [piece.text for piece in pieces] == ["one"]
    assert type(error) is Unavailable
    assert says in str(error)


def connect(script: Script) -> RemoteChat:
    """To a server that answers every request with `script`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await script(writer)
        writer.close()

    async def run() -> RemoteChat:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            address = Address(f"http://{host}:{port}")
            return await asyncio.to_thread(RemoteChat.connect, address, SAMPLING)

    return asyncio.run(run())


def test_a_chat_is_with_the_first_model_of_the_server() -> None:
    models = b'{"data": [{"id": "small"}, {"id": "other"}]}'
    remote = connect(whole("200 OK", models))
    assert remote.model == "small"
    assert remote.title == f"small at {remote.address.url}"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (whole("503 Service Unavailable", REFUSAL), "answers 503: two lines"),
        (whole("401 Unauthorized", REFUSAL), "answers 401: two lines"),
        (whole("200 OK", b"<html>"), "lists no model at /v1/models"),
        (whole("200 OK", b"[]"), "lists no model at /v1/models"),
        (whole("200 OK", b'{"data": []}'), "lists no model at /v1/models"),
    ],
)
def test_a_server_without_a_model_to_talk_to_is_one_line(script: Script, says: str) -> None:
    with pytest.raises(Unavailable, match=says) as error:
        connect(script)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [None, "two\nlines"])
def test_where_nobody_can_be_asked_is_one_line(key: str | None) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match=f"no server answers at {url}: ") as error:
        RemoteChat.connect(Address(url, key), SAMPLING)
    assert "\n" not in str(error.value)


def test_the_key_is_the_one_given_or_the_first_of_the_flag() -> None:
    server = ServerSettings(api_key=SecretStr(" first, second"))
    assert key_of("given", server) == "given"
    assert key_of(None, server) == "first"
    assert key_of(None, ServerSettings()) is None
