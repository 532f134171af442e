"""Runs a measurement in a child process and hears its results while it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.cuda_check.parts import Measurement
from engine.parent_death import die_with_parent

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH = "140"  # columns of a child's tables: stdout is a pipe there

Hear = Callable[[dict[str, Any]], None]
Show = Callable[[str], None]


def run_child(
    measurement: Measurement, flags: Mapping[str, str], hear: Hear, show: Show
) -> str | None:
    """Run it with `flags` over our environment; hand each result to `hear`, other lines to `show`.

    Returns why it failed, if it did.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.cuda_check.child", measurement.run],
        cwd=ROOT,
        env={"COLUMNS": WIDTH, "LOG_LEVEL": "WARNING", **os.environ, **flags},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that all it started can be ended with it
        preexec_fn=lambda: die_with_parent(signal.SIGTERM),
    )
    late = threading.Event()

    def end_late() -> None:
        late.set()
        _end(child)

    timer = threading.Timer(measurement.limit_s, end_late)
    timer.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                hear(json.loads(line))
            else:
                show(line)
        code = child.wait()
    finally:
        timer.cancel()
        _end(child)
        child.wait()
    if late.is_set():
        return f"{measurement.name}: no end within {measurement.limit_s:g} s"
    return f"{measurement.name}: ended with code {code}" if code else None


def _end(child: subprocess.Popen[str]) -> None:
    """End it and what it started. A server that it started ends with its parent."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
