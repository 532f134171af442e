"""A server of our own for the time of a benchmark: started, waited for, and always ended."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rich.console import Console

from backend.interface import StartFailed, Unavailable
from bench.http_connection import Address
from bench.server_facts import check_ready
from engine.parent_death import die_with_parent

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
APPLICATION = "api.server:app"
LOOK_S = 0.1  # between two questions whether it is ready
STOP_S = 60.0  # that it has to end its engines
SHOWN = 20  # lines of its log
COMPLAINTS = ("WARNING", "ERROR", "CRITICAL")


@contextmanager
def own_server(application: str = APPLICATION, **flags: str) -> Iterator[str]:
    """The URL of a server with this process's environment and `flags`, once it is ready.

    Raises StartFailed with the server's own words when it ends before that. However the block is
    left, the server and its engines are gone, or killed after STOP_S. What it complained about
    meanwhile is told on the log.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        port = free_port()
        process = _start(application, port, log, flags)
        try:
            url = f"http://127.0.0.1:{port}"
            with Console(stderr=True).status("starting a server"):
                _wait_until_ready(process, Address(url), log)
            yield url
            if process.poll() is not None:
                logger.error("the server ended by itself, with code %d", process.returncode)
        finally:
            _stop(process)
        for line in _lines(log)[-SHOWN:]:
            if line.startswith(COMPLAINTS):
                logger.warning("the server's log: %s", line)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _start(
    application: str, port: int, log: IO[str], flags: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "uvicorn", application, "--app-dir", str(ROOT)),
            *("--host", "127.0.0.1", "--port", str(port), "--no-access-log"),
        ],
        env={**os.environ, **flags},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C ends the benchmark, and the benchmark ends the server
        preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # when the benchmark is killed
    )


def _wait_until_ready(process: subprocess.Popen[bytes], address: Address, log: IO[str]) -> None:
    while process.poll() is None:
        try:
            check_ready(address)
            return
        except Unavailable:
            time.sleep(LOOK_S)
    ended = f"the server ended with code {process.returncode} before it was ready"
    raise StartFailed(start_failure(_lines(log)) or ended)


def start_failure(lines: list[str]) -> str | None:
    """What a log says about a start that failed, without the logger's name; None if nothing."""
    for level in ("CRITICAL", "ERROR"):  # the first: what follows is a consequence
        for line in lines:
            if match := re.match(rf"{level}\b[^:]*:\s*(.+)", line):
                return match[1]
    last = lines[-1] if lines else ""
    return None if last.startswith("INFO") else last or None


def _lines(log: IO[str]) -> list[str]:
    log.seek(0)
    return [line.rstrip() for line in log if line.strip()]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it, and kill what is left of it."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        logger.warning("the server did not end within %g s and is killed", STOP_S)
    finally:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
