"""Processes on a GPU and what they hold, as tests see it from outside."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import psutil

ANSWER_S = 60.0  # that the driver may take, beside a process that it is taking apart


def used_mib() -> int:
    """The first device's memory that is in use, by whomever."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWER_S)
    return int(done.stdout)


def say(what: str) -> None:
    """For whoever reads along."""
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}, {used_mib()} MiB] {what}\n")


def eventually(holds: Callable[[], bool], what: str, patience_s: float = 30.0) -> None:
    """Wait until something holds."""
    until = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is not one that has ended already."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def runtimes() -> list[psutil.Process]:
    """Processes that were started for a runtime, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if "MINISGL_RUNTIME" in process.environ():
                found.append(process)
        except psutil.Error:
            continue  # gone, or somebody else's
    return found
