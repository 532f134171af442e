"""A real server: its front process, its engines, its log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 60.0  # for whatever ought to happen; it does within a few, on a quiet machine

Found = TypeVar("Found")


def eventually(look: Callable[[], Found | None], what: str) -> Found:
    """The first true result of `look`."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen")


class ServerProcess:
    """`uvicorn api.server:app` on a port of its own."""

    def __init__(self, log: Path, *arguments: str, **flags: object) -> None:
        self.log = log
        environment = os.environ | {"BACKEND_IMPL": "fake"}
        environment |= {name: str(value) for name, value in flags.items()}
        command = [sys.executable, "-m", "uvicorn", "api.server:app", "--port", "0", *arguments]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file
            )
        self.family: dict[int, psutil.Process] = {}  # every child that was ever seen
        self.control = str(flags.get("ZMQ_CONTROL_ENDPOINT", ""))  # where it is controlled

    @property
    def text(self) -> str:
        """The log so far."""
        return self.log.read_text()

    @property
    def url(self) -> str:
        """Where it listens."""

        def look() -> re.Match[str] | None:
            assert self.process.poll() is None, self.text
            return re.search(r"running on (http://[\d.]+:\d+)", self.text)

        return eventually(look, "listening")[1]

    def children(self) -> list[psutil.Process]:
        """Every process below the front's, itself left out."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.family |= {each.pid: each for each in found}
        return found

    def engines(self) -> list[psutil.Process]:
        """Engine processes, in order of their start."""
        found = [each for each in self.children() if "engine.worker" in " ".join(_command(each))]
        return sorted(found, key=lambda each: each.create_time())

    def ready(self) -> str:
        """Wait until it serves. Returns its address."""
        url = self.url

        def look() -> bool:
            assert self.process.poll() is None, self.text
            try:
                return httpx.get(f"{url}/health/ready").status_code == 200
            except httpx.ConnectError:  # a reloader announces its child before it listens
                return False

        eventually(look, "serving")
        self.children()
        return url

    def left_over(self) -> list[psutil.Process]:
        """Children that are still alive."""
        self.children()
        return [each for each in self.family.values() if _alive(each)]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end of all. Returns the exit code."""
        self.children()
        self.process.send_signal(how)
        code = self.process.wait(PATIENCE_S)
        eventually(lambda: not self.left_over(), "the end of the engines")
        return code


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def serving(log: Path, *arguments: str, **flags: object) -> Iterator[ServerProcess]:
    """A server over the fake backend, unless the flags say otherwise; in the end nothing of it is
    left.
    """
    server = ServerProcess(log, *arguments, **flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
        for process in server.left_over():
            process.kill()
