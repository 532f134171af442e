"""The control plane's client: command lines, exit codes, and who it takes for an answer."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from ipc.zmq_control import MAX_MESSAGE, ask, main
from tests.ipc.control_bench import DEADLINE_S, free_endpoint, serving


@pytest.fixture
def endpoint() -> str:
    return free_endpoint()


def answered(endpoint: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The client's exit code, and the command that reached a server."""
    seen: list[dict[str, Any]] = []

    async def handle(command: dict[str, Any]) -> dict[str, Any]:
        seen.append(command)
        return {"error": "refused"} if command["cmd"] == "flush" else {"ok": True}

    async def scene() -> int:
        async with serving(endpoint, handle):
            return await asyncio.to_thread(main, ["--endpoint", endpoint, *arguments])

    code = asyncio.run(scene())
    (command,) = seen
    return code, command


COMMANDS: dict[str, dict[str, Any]] = {
    "metrics": {"cmd": "metrics"},
    "stats": {"cmd": "stats"},
    "health": {"cmd": "health"},
    "warm --tokens 8": {"cmd": "warm", "tokens": 8},
    "warm --prefix Hello": {"cmd": "warm", "prefix": "Hello"},
    "drain": {"cmd": "drain"},
    "drain --wait": {"cmd": "drain", "wait": 30.0},
    "drain --wait 2.5": {"cmd": "drain", "wait": 2.5},
    "resume": {"cmd": "resume"},
    "pause": {"cmd": "pause"},
    "pause --mode in_place": {"cmd": "pause", "mode": "in_place"},
    "continue": {"cmd": "continue"},
    "abort --id a": {"cmd": "abort", "id": "a"},
    "abort --key one": {"cmd": "abort", "key": "one"},
    "abort --all": {"cmd": "abort", "all": True},
    "set max_queued=5 max_inflight_total=0": {
        "cmd": "set",
        "max_queued": 5,
        "max_inflight_total": 0,
    },
    "log_level debug": {"cmd": "log_level", "level": "DEBUG"},
    "metrics --timeout 5": {"cmd": "metrics"},
}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_verb_has_a_command_line(
    endpoint: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(endpoint, *line.split()) == (0, COMMANDS[line])
    said = capsys.readouterr()
    assert json.loads(said.out) == {"ok": True}
    assert said.err == ""


def test_an_error_is_shown_and_is_the_exit_code(
    endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(endpoint, "flush") == (1, {"cmd": "flush"})
    assert json.loads(capsys.readouterr().out) == {"error": "refused"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "reboot",
        "warm",
        "warm --tokens 8 --prefix a",
        "warm --tokens many",
        "abort",
        "abort --all --id a",
        "set",
        "set max_queued",
        "set max_queued=few",
        "log_level",
        "drain --wait nan",
        "--timeout -1 metrics",
        "metrics surplus",
    ],
)
def test_wrong_arguments_are_exit_code_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--endpoint", "nonsense", "metrics"],
        ["warm", "--tokens", str(10**30)],
        ["warm", "--prefix", "\udcff"],
    ],
)
def test_what_cannot_be_sent_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_flag_that_is_wrong_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZMQ_CONTROL", "perhaps")
    assert main(["metrics"]) == 2
    assert "ZMQ_CONTROL" in capsys.readouterr().err


def test_nobody_there_is_exit_code_3_and_one_line(
    endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--endpoint", endpoint, "--timeout", "0.05", "metrics"]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert endpoint in said.err


def test_somebody_else_there_is_exit_code_3(
    endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scene() -> int:
        async with peer_that_answers(endpoint, b"HTTP/1.1 400"):
            return await asyncio.to_thread(main, ["--endpoint", endpoint, "metrics"])

    assert asyncio.run(scene()) == 3
    assert endpoint in capsys.readouterr().err


@asynccontextmanager
async def peer_that_answers(endpoint: str, answer: bytes) -> AsyncIterator[None]:
    """Not our server: it gives everybody the same answer."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.REP)
    socket.bind(endpoint)

    async def reply() -> None:
        await socket.recv()
        await socket.send(answer)

    task = asyncio.create_task(reply())
    try:
        yield
        await task
    finally:
        context.destroy(linger=0)


def test_waiting_for_a_drain_is_added_to_the_timeout(endpoint: str) -> None:
    async def handle(command: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.2)  # longer than --timeout, shorter than both
        return {"ok": True}

    async def scene() -> int:
        async with serving(endpoint, handle):
            arguments = ["--endpoint", endpoint, "--timeout", "0.1", "drain", "--wait", "9"]
            return await asyncio.to_thread(main, arguments)

    assert asyncio.run(scene()) == 0


def test_an_answer_may_be_larger_than_a_command(endpoint: str) -> None:
    async def handle(command: dict[str, Any]) -> dict[str, Any]:
        return {"text": "a" * (2 * MAX_MESSAGE)}

    async def scene() -> dict[str, Any]:
        async with serving(endpoint, handle):
            return await asyncio.to_thread(ask, endpoint, {"cmd": "stats"}, DEADLINE_S)

    assert len(asyncio.run(scene())["text"]) == 2 * MAX_MESSAGE


def test_the_client_is_a_module_and_finds_the_server_by_the_flag(endpoint: str, root: Path) -> None:
    def ask_as_a_user_does() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ipc.zmq_control", "metrics"],
            env={**os.environ, "ZMQ_CONTROL_ENDPOINT": endpoint},
            cwd=root,
            capture_output=True,
            text=True,
            timeout=60,
        )

    async def scene() -> subprocess.CompletedProcess[str]:
        async with serving(endpoint):
            return await asyncio.to_thread(ask_as_a_user_does)

    done = asyncio.run(scene())
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"ok": True, "command": {"cmd": "metrics"}}
