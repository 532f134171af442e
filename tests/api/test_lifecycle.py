"""Who hears of a signal, and that one start has one fleet of engines."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import cast
from unittest.mock import patch

import pytest

from api.fleet_guard import FleetGuard
from api.lifecycle import ENDS, on_signal
from backend.interface import StartFailed

PATIENCE_S = 20
Listener = Callable[[int, FrameType | None], None]


@pytest.fixture(autouse=True)
def listeners_are_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDS}
    yield
    for number, listener in before.items():
        signal.signal(number, listener)


class Log:
    """Who was called, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def listener(self, name: str) -> Listener:
        return lambda number, frame: self.said.append(f"{name} {signal.Signals(number).name}")


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_is_heard_here_and_by_whoever_listened_before(number: signal.Signals) -> None:
    log = Log()

    async def scenario() -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()

        def act() -> None:
            assert asyncio.get_running_loop() is loop
            assert asyncio.current_task() is None  # nobody's work was interrupted for it
            log.said.append("act")
            told.set()

        signal.signal(number, log.listener("before"))
        restore = on_signal(act)
        for times in (1, 2):
            os.kill(os.getpid(), number)
            await asyncio.wait_for(told.wait(), PATIENCE_S)
            told.clear()
            assert sorted(log.said) == ["act"] * times + [f"before {number.name}"] * times
        restore()

    asyncio.run(scenario())
    signal.raise_signal(number)
    assert log.said[4:] == [f"before {number.name}"]


@pytest.mark.parametrize("listener", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_nobody_listened_to_is_heard_here_alone(listener: signal.Handlers) -> None:
    async def scenario() -> None:
        told = asyncio.Event()
        signal.signal(signal.SIGTERM, listener)
        restore = on_signal(told.set)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(told.wait(), PATIENCE_S)
        restore()
        assert signal.getsignal(signal.SIGTERM) is listener

    asyncio.run(scenario())


def test_who_came_later_goes_on_listening() -> None:
    log = Log()

    async def scenario() -> None:
        restore = on_signal(lambda: log.said.append("act"))
        later = log.listener("later")
        signal.signal(signal.SIGTERM, later)
        restore()
        restore()
        assert signal.getsignal(signal.SIGTERM) is later

    asyncio.run(scenario())
    signal.raise_signal(signal.SIGTERM)
    assert log.said == ["later SIGTERM"]


def test_a_server_in_another_thread_leaves_signals_alone() -> None:
    before = [signal.getsignal(number) for number in ENDS]

    async def scenario() -> None:
        restore = on_signal(lambda: None)
        restore()

    thread = threading.Thread(target=lambda: asyncio.run(scenario()))
    thread.start()
    thread.join(PATIENCE_S)
    assert [signal.getsignal(number) for number in ENDS] == before


# One fleet of engines

HOLD = """
import multiprocessing, sys, tempfile
from types import SimpleNamespace
supervisor, tempfile.tempdir = int(sys.argv[1]), sys.argv[2]
multiprocessing.parent_process = lambda: SimpleNamespace(pid=supervisor)
from api.fleet_guard import FleetGuard
guard = FleetGuard()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where locks are: a folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def supervisor(name: str = "uvicorn") -> Iterator[subprocess.Popen[bytes]]:
    """A process whose workers we are, as far as a guard can see."""
    sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()", name]
    with subprocess.Popen(sleeper, stdin=subprocess.PIPE) as process:
        seen = cast(BaseProcess, SimpleNamespace(pid=process.pid))
        with patch("multiprocessing.parent_process", return_value=seen):
            yield process
        process.kill()


def test_a_server_that_is_no_worker_needs_no_guard(locks: Path) -> None:
    with patch("multiprocessing.parent_process", return_value=None):
        guards = [FleetGuard(), FleetGuard()]
    for guard in guards:
        guard.release()
    assert list(locks.iterdir()) == []


def test_a_second_worker_is_refused_and_ends_the_whole_start(locks: Path) -> None:
    with supervisor() as process:
        guard = FleetGuard()
        with pytest.raises(StartFailed, match="use one worker") as refusal:
            FleetGuard()
        assert "\n" not in str(refusal.value)
        assert process.wait(PATIENCE_S) == -signal.SIGTERM
        guard.release()
        assert list(locks.iterdir()) == []


def test_another_program_may_start_several_servers(locks: Path) -> None:
    with supervisor("cluster.py") as process:
        FleetGuard()
        FleetGuard()
        assert process.poll() is None
    assert list(locks.iterdir()) == []


def test_a_worker_that_has_stopped_makes_room_for_the_next() -> None:
    with supervisor() as process:
        for _ in range(2):  # as a reload does
            guard = FleetGuard()
            guard.release()
            guard.release()
        assert process.poll() is None


def test_a_worker_that_was_killed_makes_room_too(locks: Path, root: Path) -> None:
    with supervisor() as process:
        command = [sys.executable, "-c", HOLD, str(process.pid), str(locks)]
        with subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"held\n"
            worker.kill()
            worker.wait(PATIENCE_S)
        FleetGuard().release()
        assert process.poll() is None


def test_two_starts_on_one_machine_do_not_meet() -> None:
    with supervisor() as one:
        mine = FleetGuard()
        with supervisor() as other:
            FleetGuard().release()
            assert (one.poll(), other.poll()) == (None, None)
        mine.release()


def test_a_link_in_the_place_of_the_lock_is_not_followed(locks: Path) -> None:
    """Anybody may write into the folder for temporary files."""
    with supervisor() as process:
        target = locks / "precious"
        (locks / f"minisgl-{os.getuid()}-{process.pid}.lock").symlink_to(target)
        with pytest.raises(StartFailed, match="lock") as refusal:
            FleetGuard()
        assert "\n" not in str(refusal.value)
        assert not target.exists()
        assert process.poll() is None
