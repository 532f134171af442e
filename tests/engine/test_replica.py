"""Engines as processes: what is heard of them, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from backend.interface import BackendFailed, StartFailed
from engine.devices import ReplicaPlan
from engine.replica import Replica
from ipc.messages import Cancel, Step
from tests.engine.process_bench import PATIENCE_S, PROMPT, greedy, socket_place, submit

Runner = Callable[[Coroutine[Any, Any, None]], None]

FRONT = """
import asyncio
from engine.devices import ReplicaPlan
from engine.replica import Replica

async def main():
    replica = Replica(ReplicaPlan(0, "cpu", {}))
    start = asyncio.ensure_future(replica.start(lambda name, seconds: print(name, flush=True)))
    while replica.pid is None:
        await asyncio.sleep(0)
    print(replica.pid, flush=True)
    await start
    print("ready", flush=True)
    await replica.run(lambda step: None)

asyncio.run(main())
"""


LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux ends a stopped engine with its front"
)


@pytest.fixture(autouse=True)
def _place(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Sockets are made where they must leave nothing, pytest's files elsewhere."""
    monkeypatch.setenv("BACKEND_IMPL", "fake")
    tmp_path_factory.getbasetemp()
    with socket_place(monkeypatch):
        yield


def run(main: Coroutine[Any, Any, None], runner: Runner = asyncio.run) -> None:
    runner(asyncio.wait_for(main, PATIENCE_S))


def is_alive(pid: int) -> bool:
    """Whether a process runs. An orphan that nobody has reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Ear:
    """What was heard of one engine."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, list[str]] = {}
        self._news = asyncio.Event()
        self.end = asyncio.ensure_future(replica.run(self._hear))

    def _hear(self, step: Step) -> None:
        for delta in step.deltas():
            self.tokens.setdefault(delta.id, []).extend(delta.tokens)
            if delta.finish:
                self.reasons.setdefault(delta.id, []).append(delta.finish.reason)
        self._news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._news.clear()
            await self._news.wait()


@asynccontextmanager
async def serving(replica: Replica | None = None) -> AsyncIterator[Ear]:
    """An engine that serves. In the end no process is left of it."""
    replica = replica or Replica(ReplicaPlan(0, "cpu", {}))
    await replica.start(lambda name, seconds: None)
    pid = replica.pid
    assert pid is not None
    ear = Ear(replica)
    await asyncio.sleep(0)  # it listens from now on
    try:
        yield ear
    finally:
        await replica.close(PATIENCE_S)
        await ear.end
    assert replica.pid is None
    assert not psutil.pid_exists(pid), "a zombie"


# Lives


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_an_engine_starts_wherever_we_are_and_answers(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if sys.version_info >= (3, 11):
        Path("config.py").write_text("raise RuntimeError('the wrong config')")
    phases: list[str] = []

    async def main() -> None:
        replica = Replica(ReplicaPlan(0, "cpu", {"MAX_RUNNING": "17"}))
        spec = await replica.start(lambda name, seconds: phases.append(name))
        assert (spec.name, spec.max_running) == ("fake", 17)
        pid = replica.pid
        assert pid is not None
        ear = Ear(replica)
        replica.send(submit("a"))
        await ear.until(lambda: "a" in ear.reasons)
        assert (ear.tokens["a"], ear.reasons["a"]) == (greedy(PROMPT, 4), ["length"])
        assert [await each for each in (replica.flush(), replica.flush())] == [0, 0]
        await replica.close(PATIENCE_S)
        assert await ear.end == "engine 0 ended with exit code 0"
        assert not psutil.pid_exists(pid)

    run(main(), runner)
    assert phases == ["process", "backend"]


def test_a_cancelled_answer_ends_with_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_MS", "5")

    async def main() -> None:
        async with serving() as ear:
            ear.replica.send(submit("a", new=5000))
            await ear.until(lambda: "a" in ear.tokens)
            ear.replica.send(Cancel("a"))
            await ear.until(lambda: "a" in ear.reasons)
            assert ear.reasons["a"] == ["abort"]

    run(main())


def test_a_failed_backend_ends_its_answers_says_why_and_another_engine_takes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT_STEP", "3")

    async def main() -> None:
        replica = Replica(ReplicaPlan(0, "cpu", {}))
        async with serving(replica) as ear:
            replica.send(submit("a"))
            reason = await ear.end
            assert ear.reasons == {"a": ["error"]}
            assert reason.startswith("the backend failed: DeviceLost: the fake device was lost")
            with pytest.raises(BackendFailed, match="DeviceLost"):
                await replica.flush()
            replica.send(submit("dropped"))
            monkeypatch.delenv("FAKE_FAIL_AT_STEP")
            async with serving(replica) as again:
                replica.send(submit("a"))
                await again.until(lambda: "a" in again.reasons)
                assert again.reasons == {"a": ["length"]}

    run(main())


# Deaths


def test_a_killed_engine_is_reported_as_such_and_whoever_waits_for_it_hears() -> None:
    async def main() -> None:
        async with serving() as ear:
            pid = ear.replica.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            flush = asyncio.ensure_future(ear.replica.flush())
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            reason = await ear.end
            assert reason == "engine 0 was ended by SIGKILL, perhaps for want of memory"
            with pytest.raises(BackendFailed, match="SIGKILL"):
                await flush

    run(main())


def test_an_engine_that_hangs_is_killed_in_the_end() -> None:
    async def main() -> None:
        async with serving() as ear:
            assert ear.replica.pid is not None
            os.kill(ear.replica.pid, signal.SIGSTOP)
            await ear.replica.close(0.05)
            assert "SIGKILL" in await ear.end

    run(main())


def test_a_start_that_fails_is_one_line_and_leaves_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_LOCAL_DIR", str(tmp_path))

    async def main() -> None:
        replica = Replica(ReplicaPlan(0, "cpu", {}))
        with pytest.raises(StartFailed, match=rf"^MODEL_LOCAL_DIR={tmp_path} has no config.json"):
            await replica.start(lambda name, seconds: None)
        assert replica.pid is None
        monkeypatch.delenv("MODEL_LOCAL_DIR")
        async with serving(replica):
            pass

    run(main())


def test_a_process_that_dies_without_a_word_is_told_in_words() -> None:
    async def main() -> None:
        replica = Replica(ReplicaPlan(3, "cpu", {"PYTHONHOME": "/nowhere"}))
        words = '^engine 3 ended with exit code 1 in the start-up phase "process"$'
        with pytest.raises(StartFailed, match=words):
            await replica.start(lambda name, seconds: None)

    run(main())


def test_an_end_that_is_given_up_is_an_end_all_the_same() -> None:
    async def main() -> None:
        async with serving() as ear:
            pid = ear.replica.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            close = asyncio.ensure_future(ear.replica.close(PATIENCE_S))
            await asyncio.sleep(0)
            close.cancel()
            with pytest.raises(asyncio.CancelledError):
                await close
            assert "SIGKILL" in await ear.end

    run(main())


def test_a_start_that_is_given_up_leaves_no_process() -> None:
    async def main() -> None:
        replica = Replica(ReplicaPlan(0, "cpu", {}))
        start = asyncio.ensure_future(replica.start(lambda name, seconds: None))
        while replica.pid is None:
            await asyncio.sleep(0)
        pid = replica.pid
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert not psutil.pid_exists(pid)

    run(main())


@pytest.mark.parametrize(
    ("moment", "stopped"),
    [
        ("spawned", False),  # stopped then it runs no code of ours yet, and nothing watches it
        ("process", False),
        ("ready", False),
        pytest.param("process", True, marks=LINUX),
        pytest.param("ready", True, marks=LINUX),
    ],
)
def test_an_engine_dies_with_its_front_however_that_dies(
    root: Path, moment: str, stopped: bool
) -> None:
    """A stopped engine cannot look at its lifeline: there the kernel kills it."""
    command = [sys.executable, "-c", FRONT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as front:
        assert front.stdout is not None
        pid = int(front.stdout.readline())
        while moment != "spawned" and front.stdout.readline().strip() != moment:
            assert front.poll() is None
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        front.kill()
    deadline = time.monotonic() + PATIENCE_S
    while is_alive(pid):
        assert time.monotonic() < deadline, "an engine was left behind"
        time.sleep(0.01)
