"""The token plane over real sockets."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq

from backend.interface import StartFailed
from ipc import zmq_data
from ipc.messages import Cancel, EngineMessage, Failed, Flush, Flushed, Phase
from ipc.zmq_data import LONGEST_BASE, EngineLink, FrontLink
from tests.engine.process_bench import PATIENCE_S, socket_place

ROUNDS = 100

Runner = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Runner:
    """Runs a coroutine under one kind of event loop."""
    runner: Runner = request.param
    return lambda main: runner(asyncio.wait_for(main, PATIENCE_S))


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are made. In the end nothing is left there."""
    with socket_place(monkeypatch) as folder:
        yield folder


def heard(front: FrontLink, count: int) -> list[object]:
    """The next `count` messages from the front."""
    messages: list[object] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(messages) < count and time.monotonic() < deadline:
        front.poll(1.0)
        messages += front.receive()
    return messages


async def said(link: EngineLink, count: int) -> list[EngineMessage]:
    """The next `count` messages from the engine."""
    messages: list[EngineMessage] = []
    while len(messages) < count:
        messages += await link.receive()
    return messages


def test_messages_arrive_in_order_in_both_directions(run: Runner) -> None:
    async def main() -> None:
        link = EngineLink()
        front = FrontLink(link.endpoint)
        phases = [Phase("process", float(number)) for number in range(100)]
        for phase in phases:
            front.send(phase)
        assert await said(link, 100) == phases
        flushes = [Flush(number) for number in range(100)]
        for flush in flushes:
            link.send(flush)
        assert heard(front, 100) == flushes
        front.close()
        link.close()

    run(main())


def test_who_waits_is_woken_also_while_much_is_sent(run: Runner) -> None:
    async def main() -> None:
        link = EngineLink()
        front = FrontLink(link.endpoint)

        def echo() -> None:
            """Answer each flush, until the last one."""
            number = 0
            while number < ROUNDS:
                front.poll(PATIENCE_S)
                for message in front.receive():
                    if isinstance(message, Flush):
                        number = message.number
                        front.send(Flushed(number, 0))

        front.send(Phase("process", 0.5))
        await link.receive()  # only now it is connected
        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        for number in range(1, ROUNDS + 1):
            answer = asyncio.ensure_future(link.receive())
            link.send(Flush(number))
            for _ in range(20):  # each may swallow the sign that the answer has come
                link.send(Cancel("x"))
                await asyncio.sleep(0)
            assert await answer == [Flushed(number, 0)]
        thread.join()
        front.close()
        link.close()

    run(main())


def test_the_directory_is_private_and_gone_once_an_engine_has_come(
    run: Runner, place: Path
) -> None:
    async def main() -> None:
        links = [EngineLink() for _ in range(3)]
        assert len({link.endpoint for link in links}) == 3
        for folder in place.iterdir():
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        fronts = [FrontLink(link.endpoint) for link in links]
        assert list(place.iterdir()) == []
        for link, front in zip(links, fronts, strict=True):
            front.send(Phase("process", 0.5))
            assert await link.receive() == [Phase("process", 0.5)]
            front.close()
            link.close()

    run(main())


def test_a_place_too_long_for_a_socket_is_not_used(
    run: Runner, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place / ("x" * LONGEST_BASE)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    async def main() -> None:
        link = EngineLink()
        assert link.endpoint.startswith("ipc:///tmp/minisgl-")
        link.close()
        assert not os.path.exists(os.path.dirname(link.endpoint.removeprefix("ipc://")))

    run(main())
    folder.rmdir()


def test_what_is_sent_to_nobody_is_dropped_at_once(run: Runner) -> None:
    async def main() -> None:
        link = EngineLink()
        link.send(Cancel("before anybody came"))
        front = FrontLink(link.endpoint)
        front.send(Phase("process", 0.5))
        await link.receive()
        front.close()
        for _ in range(1000):
            link.send(Cancel("x" * 1000))
        link.close()

    run(main())


def test_after_the_process_has_ended_its_last_words_arrive_and_then_nothing(run: Runner) -> None:
    async def main() -> None:
        link = EngineLink()
        front = FrontLink(link.endpoint)
        for number in range(1000):
            front.send(Flushed(number, 0))
        front.send(Failed("the last"))
        front.close()
        link.end()
        messages = []
        while got := await link.receive():
            messages += got
        assert len(messages) == 1001
        assert messages[-1] == Failed("the last")
        link.close()

    run(main())


def test_a_process_that_never_came_and_a_closed_link_say_nothing(run: Runner) -> None:
    async def main() -> None:
        link = EngineLink()
        waiting = asyncio.ensure_future(link.receive())
        await asyncio.sleep(0)
        link.end()
        assert await waiting == []
        link.close()
        link = EngineLink()
        waiting = asyncio.ensure_future(link.receive())
        await asyncio.sleep(0)
        link.close()
        assert await waiting == []
        assert await link.receive() == []

    run(main())


def test_an_engine_that_never_pauses_starves_nobody(run: Runner) -> None:
    async def main() -> None:
        link = EngineLink()
        front = FrontLink(link.endpoint)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count())
        for number in range(20):
            front.send(Flushed(number, 0))
            while not zmq_data.has_something(link._socket):
                pass  # it is there before anybody asks
            before = turns
            assert await link.receive()
            assert turns > before
        counting.cancel()
        front.close()
        link.close()

    run(main())


def test_what_nobody_fetches_keeps_no_loop_busy(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    stirs = 0
    stir = EngineLink._stir

    def counted(link: EngineLink, socket: zmq.Socket[bytes]) -> None:
        nonlocal stirs
        stirs += 1
        stir(link, socket)

    monkeypatch.setattr(EngineLink, "_stir", counted)

    async def main() -> None:
        link = EngineLink()
        front = FrontLink(link.endpoint)
        front.send(Failed("the last"))
        front.close()
        while not stirs:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # a loop that spins goes round hundreds of times
        assert stirs < 20
        link.close()

    run(main())


# The engine's side


def test_an_engine_waits_for_a_message_or_a_descriptor(run: Runner) -> None:
    async def main() -> None:
        link = EngineLink()
        front = FrontLink(link.endpoint)
        reader, writer = os.pipe()
        front.poll(0.0)
        front.poll(0.01, reader)
        assert front.receive() == []
        begun = time.monotonic()
        os.write(writer, b"x")
        front.poll(PATIENCE_S, reader)
        assert front.receive() == []
        os.read(reader, 1)
        front.send(Phase("process", 0.5))
        await link.receive()
        link.send(Cancel("a"))
        front.poll(PATIENCE_S, reader)
        assert front.receive() == [Cancel("a")]
        assert time.monotonic() - begun < PATIENCE_S, "it was not woken"
        os.close(reader)
        os.close(writer)
        front.close()
        link.close()

    run(main())


def test_where_nobody_listens_is_one_line(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(zmq_data, "CONNECT_TIMEOUT_S", 0.05)
    with pytest.raises(StartFailed, match=rf"^nobody listens at ipc://{place}/engine: [^\n]*$"):
        FrontLink(f"ipc://{place}/engine")
