"""The process that ends what its starter leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backend.sglang import keeper

FILE = Path(keeper.__file__)


@contextmanager
def sleeper(**environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], env=os.environ | environment) as process:
        yield process
        process.kill()


def start(mark: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-I", "-S", str(FILE), mark], stdin=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> int:
    assert process.stdin is not None
    process.stdin.close()
    return process.wait(20)


def test_it_ends_what_is_marked_and_nothing_else() -> None:
    with sleeper(MARK="a") as mine, sleeper(MARK="ab") as other, sleeper() as nobodys:
        kept = start("MARK=a")
        assert mine.poll() is None
        assert end(kept) == 0
        assert mine.wait(5) == -signal.SIGKILL
        assert other.poll() is None
        assert nobodys.poll() is None


def test_it_ends_grandchildren_whose_parent_is_gone() -> None:
    kept = start("MARK=b")
    command = ["sh", "-c", "sleep 600 > /dev/null & echo $!"]
    done = subprocess.run(command, env=os.environ | {"MARK": "b"}, stdout=subprocess.PIPE)
    orphan = int(done.stdout)
    assert list(keeper.marked("MARK=b")) == [orphan]
    assert end(kept) == 0
    assert list(keeper.marked("MARK=b")) == []


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_it_outlives_what_is_sent_to_its_starter(by: signal.Signals) -> None:
    with sleeper(MARK=f"c{by}") as mine:
        kept = start(f"MARK=c{by}")
        while "SigIgn:\t0000000000000000" in Path(f"/proc/{kept.pid}/status").read_text():
            assert kept.poll() is None
        while not int(_ignored(kept.pid), 16) & 1 << (by - 1):
            assert kept.poll() is None
        kept.send_signal(by)
        assert end(kept) == 0
        assert mine.wait(5) == -signal.SIGKILL


def _ignored(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("SigIgn:"))


def test_it_needs_nothing_of_ours() -> None:
    command = [sys.executable, "-I", "-S", "-X", "importtime", str(FILE), "MARK=d"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "backend" not in done.stderr
