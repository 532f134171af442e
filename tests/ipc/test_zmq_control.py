"""The control socket, over real sockets: who is answered, and what hostile peers get."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
import pytest
import uvloop
import zmq

from backend.interface import StartFailed
from ipc.zmq_control import MAX_MESSAGE, MAX_READ, MAX_VERBS, ControlSocket
from tests.ipc.control_bench import echo, free_endpoint, peer, serving


@pytest.fixture
def endpoint() -> str:
    return free_endpoint()


def test_a_client_is_answered_again_and_again(endpoint: str) -> None:
    async def scene() -> None:
        async with serving(endpoint), peer(endpoint) as client:
            for number in range(3):
                answer = await client.ask(orjson.dumps({"cmd": "x", "n": number}))
                assert answer == {"ok": True, "command": {"cmd": "x", "n": number}}

    asyncio.run(scene())


def test_it_answers_on_the_event_loop_of_the_server_too(endpoint: str) -> None:
    async def scene() -> dict[str, Any]:
        async with serving(endpoint), peer(endpoint) as client:
            return await client.ask(b"{}")

    assert uvloop.run(scene())["ok"] is True


def test_a_slow_verb_keeps_nobody_waiting(endpoint: str) -> None:
    async def scene() -> None:
        go = asyncio.Event()

        async def handle(command: dict[str, Any]) -> dict[str, Any]:
            if command["cmd"] == "slow":
                await go.wait()
            return command

        async with serving(endpoint, handle), peer(endpoint) as slow, peer(endpoint) as quick:
            await slow.send(b'{"cmd": "slow"}')
            assert await quick.ask(b'{"cmd": "quick"}') == {"cmd": "quick"}
            go.set()
            assert json.loads((await slow.receive())[0]) == {"cmd": "slow"}

    asyncio.run(scene())


HOSTILE: dict[str, tuple[tuple[bytes, ...], str]] = {
    "empty": ((b"",), "invalid_json"),
    "truncated": ((b'{"cmd": "stats"',), "invalid_json"),
    "no JSON": ((b"stats",), "invalid_json"),
    "two objects": ((b"{}{}",), "invalid_json"),
    "a list": ((b'[{"cmd": "stats"}]',), "invalid_json"),
    "a string": ((b'"stats"',), "invalid_json"),
    "null": ((b"null",), "invalid_json"),
    "not UTF-8": ((b'{"cmd": "\xff\xfe"}',), "invalid_json"),
    "half a surrogate pair": ((b'{"cmd": "\\ud800"}',), "invalid_json"),
    "NaN": ((b'{"cmd": NaN}',), "invalid_json"),
    "no finite number": ((b'{"cmd": 1e999}',), "invalid_json"),
    "deep": ((b'{"cmd": ' + b"[" * 50_000,), "invalid_json"),
    "deep and closed": ((b"[" * 30_000 + b"]" * 30_000,), "invalid_json"),
    "two parts": ((b'{"cmd": "stats"}', b'{"cmd": "stats"}'), "invalid_json"),
    "many parts": ((b"{}",) * 1000, "invalid_json"),
    "a zero byte": ((b'{"cmd": "stats"}\0',), "invalid_json"),
    "too large": ((b'{"cmd": "' + b"a" * MAX_MESSAGE + b'"}',), "message_too_large"),
    "blanks": ((b" " * (MAX_MESSAGE + 1),), "message_too_large"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_gets_an_error_and_reaches_no_verb(endpoint: str, name: str) -> None:
    parts, kind = HOSTILE[name]
    reached: list[dict[str, Any]] = []

    async def handle(command: dict[str, Any]) -> dict[str, Any]:
        reached.append(command)
        return {"ok": True}

    async def scene() -> None:
        async with serving(endpoint, handle), peer(endpoint) as client:
            answer = await client.ask(*parts)
            assert answer.keys() == {"error", "message"}
            assert answer["error"] == kind
            assert "\n" not in answer["message"]
            assert len(answer["message"]) < 300
            assert reached == []
            assert await client.ask(b'{"cmd": "stats"}') == {"ok": True}

    asyncio.run(scene())


def test_the_largest_command_is_a_command(endpoint: str) -> None:
    async def scene() -> None:
        async with serving(endpoint), peer(endpoint) as client:
            body = b'{"cmd": "' + b"a" * (MAX_MESSAGE - 11) + b'"}'
            assert len(body) == MAX_MESSAGE
            assert (await client.ask(body))["ok"] is True

    asyncio.run(scene())


def test_numbers_beyond_every_bound_reach_the_verb_as_floats(endpoint: str) -> None:
    async def scene() -> None:
        async with serving(endpoint), peer(endpoint) as client:
            answer = await client.ask(b'{"tokens": 1' + b"0" * 300 + b"}")
            assert answer["command"] == {"tokens": 1e300}

    asyncio.run(scene())


def test_what_is_larger_than_anybody_reads_ends_the_connection(endpoint: str) -> None:
    async def scene() -> None:
        async with (
            serving(endpoint),
            peer(endpoint, zmq.DEALER) as hostile,
            peer(endpoint) as other,
        ):
            assert (await other.ask(b"{}"))["ok"] is True
            await hostile.send(b"", b"{}")
            assert await hostile.receive()
            await hostile.send(b"", b" " * (MAX_READ + 1))
            assert (await other.ask(b"{}"))["ok"] is True
            await hostile.send(b"", b'{"cmd": "again"}')  # a new connection, the old one is gone
            assert b"again" in (await hostile.receive())[1]

    asyncio.run(scene())


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"\0" * 5000])
def test_who_speaks_another_protocol_disturbs_nobody(endpoint: str, noise: bytes) -> None:
    async def scene() -> None:
        async with serving(endpoint), peer(endpoint) as client:
            host, port = endpoint.removeprefix("tcp://").split(":")
            _, stranger = await asyncio.open_connection(host, int(port))
            stranger.write(noise)
            assert (await client.ask(b"{}"))["ok"] is True
            stranger.close()

    asyncio.run(scene())


def test_an_envelope_without_an_end_is_dropped(endpoint: str) -> None:
    async def scene() -> None:
        async with serving(endpoint), peer(endpoint, zmq.DEALER) as client:
            await client.send(b'{"cmd": "lost"}')
            await client.send(b"hop", b"hop", b'{"cmd": "lost"}')
            await client.send(b"", b'{"cmd": "found"}')
            assert b"found" in (await client.receive())[1]

    asyncio.run(scene())


def test_the_envelope_comes_back_as_it_was(endpoint: str) -> None:
    async def scene() -> None:
        async with serving(endpoint), peer(endpoint, zmq.DEALER) as proxy:
            for body in (b'{"cmd": "x"}', b"no JSON"):
                await proxy.send(b"client", b"proxy", b"", body)
                assert (await proxy.receive())[:3] == [b"client", b"proxy", b""]

    asyncio.run(scene())


@pytest.mark.parametrize("outcome", ["raises", "returns what is no JSON"])
def test_a_defect_is_the_answer_of_its_command_alone(
    endpoint: str, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(command: dict[str, Any]) -> dict[str, Any]:
        if command["cmd"] == "fine":
            return {"ok": True}
        if outcome == "raises":
            raise KeyError("line one\nline two")
        return {"object": object()}

    async def scene() -> None:
        async with serving(endpoint, handle), peer(endpoint) as client:
            answer = await client.ask(b'{"cmd": "broken", "key": "s3cret"}')
            assert answer["error"] == "internal"
            assert "\n" not in answer["message"]
            assert await client.ask(b'{"cmd": "fine"}') == {"ok": True}

    asyncio.run(scene())
    assert "Traceback" in caplog.text
    assert "s3cret" not in caplog.text


def test_more_verbs_than_are_run_at_once_are_told_so(endpoint: str) -> None:
    async def scene() -> None:
        go = asyncio.Event()

        async def handle(command: dict[str, Any]) -> dict[str, Any]:
            await go.wait()
            return command

        async with serving(endpoint, handle), peer(endpoint, zmq.DEALER) as client:
            for number in range(MAX_VERBS + 1):
                await client.send(b"", orjson.dumps({"n": number}))
            assert json.loads((await client.receive())[1])["error"] == "busy"
            go.set()
            answers = [json.loads((await client.receive())[1]) for _ in range(MAX_VERBS)]
            assert sorted(answer["n"] for answer in answers) == list(range(MAX_VERBS))
            await client.send(b"", b'{"n": -1}')
            assert json.loads((await client.receive())[1]) == {"n": -1}

    asyncio.run(scene())


def test_the_end_tells_those_who_still_wait_and_frees_the_address(endpoint: str) -> None:
    async def scene() -> None:
        begun = asyncio.Event()

        async def handle(command: dict[str, Any]) -> dict[str, Any]:
            begun.set()
            await asyncio.Event().wait()
            return command

        async with peer(endpoint) as client:
            async with serving(endpoint, handle):
                await client.send(b"{}")
                await begun.wait()
            assert json.loads((await client.receive())[0])["error"] == "closing"
        async with serving(endpoint), peer(endpoint) as client:
            assert (await client.ask(b"{}"))["ok"] is True

    asyncio.run(scene())


@pytest.mark.parametrize(
    "wrong", ["tcp://198.51.100.77:5557", "tcp://127.0.0.1:notaport", "nonsense", "tcp://nowhere:1"]
)
def test_an_address_that_cannot_be_taken_stops_the_start_in_one_line(wrong: str) -> None:
    async def scene() -> None:
        with pytest.raises(StartFailed) as failure:
            ControlSocket(wrong, echo).start()
        assert f"ZMQ_CONTROL_ENDPOINT={wrong}" in str(failure.value)
        assert "\n" not in str(failure.value)

    asyncio.run(scene())


def test_an_address_in_use_stops_the_start(endpoint: str) -> None:
    async def scene() -> None:
        async with serving(endpoint):
            with pytest.raises(StartFailed, match="already in use"):
                ControlSocket(endpoint, echo).start()

    asyncio.run(scene())


def test_an_address_that_others_reach_is_warned_of(
    endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(address: str) -> None:
        async with serving(address):
            pass

    asyncio.run(scene(endpoint))
    assert caplog.text == ""
    asyncio.run(scene(endpoint.replace("127.0.0.1", "*")))
    assert "ZMQ_CONTROL_ENDPOINT" in caplog.text
