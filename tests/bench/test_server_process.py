"""A server for the time of a benchmark, and nothing of it afterwards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from backend.interface import StartFailed, Unavailable
from bench import server_process
from bench.http_connection import Address
from bench.server_facts import check_ready
from bench.server_process import own_server, start_failure

APP = "tests.bench.scripted_app:app"
DEADLINE_S = 20.0


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def alive(process: psutil.Process) -> bool:
    """Whether it runs: a zombie only waits for whoever adopted it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_it_is_ready_inside_the_block_and_gone_after_it(caplog: pytest.LogCaptureFixture) -> None:
    with own_server(APP) as url:
        check_ready(Address(url))
        started = children()
        assert len(started) == 2  # the server and what it started
    assert not any(map(alive, started))
    with pytest.raises(Unavailable, match="no server answers"):
        check_ready(Address(url))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert re.search(r"the server's log: WARNING app: the engine is \d+$", caplog.text.strip())


def test_it_is_gone_when_the_block_fails() -> None:
    started = []

    def fail() -> None:
        with own_server(APP):
            started.extend(children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert len(started) == 2
    assert not any(map(alive, started))


def test_a_server_that_does_not_end_is_killed_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCRIPT_START", "stubborn")
    monkeypatch.setattr(server_process, "STOP_S", 0.3)
    with own_server(APP):
        server, engine = children()
    assert not alive(server)
    assert eventually(lambda: not alive(engine))
    assert "did not end within 0.3 s and is killed" in caplog.text


def test_a_server_that_ended_by_itself_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with own_server(APP) as url:
        server, engine = children()
        with pytest.raises(Unavailable):
            check_ready(Address(f"{url}/end"))
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    assert eventually(lambda: not alive(engine))
    assert "the server ended by itself, with code 9" in [each.message for each in caplog.records]


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("refused", "no model stands at /nowhere"),
        ("late", "the server cannot start: no engine came up"),
        ("killed", "the server ended with code 7 before it was ready"),
    ],
)
def test_a_failed_start_is_told_in_the_servers_own_words(
    start: str, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCRIPT_START", start)
    with pytest.raises(StartFailed) as failed, own_server(APP):
        pass
    assert str(failed.value) == says
    assert caplog.records == []


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            [
                "INFO:     Started server process [7]",
                "ERROR:    BACKEND_IMPL=vapour: Input should be 'auto'",
                "ERROR:    Application startup failed. Exiting.",
            ],
            "BACKEND_IMPL=vapour: Input should be 'auto'",
        ),
        (
            [
                "ERROR engine.supervisor: engine 0 did not start: out of memory",
                "CRITICAL api.lifecycle: the server cannot start: out of memory",
                "Traceback (most recent call last):",
            ],
            "the server cannot start: out of memory",
        ),
        (["/usr/bin/python: No module named uvicorn"], "/usr/bin/python: No module named uvicorn"),
        (["INFO:     Started server process [7]"], None),
        ([], None),
    ],
)
def test_the_line_that_says_why_is_found_in_a_log(lines: list[str], cause: str | None) -> None:
    assert start_failure(lines) == cause


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_server_does_not_outlive_a_benchmark_that_is_killed(root: Path) -> None:
    program = (
        "from bench.server_process import own_server\n"
        f"with own_server('{APP}'):\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
    )
    bench = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ,
    )
    with bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == b"ready\n"
        started = children()[1:]
        assert len(started) == 2
        bench.send_signal(signal.SIGKILL)
        bench.wait()
        assert eventually(lambda: not any(map(alive, started)))
