"""The tests of this tree that need a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from backend.interface import BackendFailed
from bench.cuda_check.children import ROOT
from bench.device import describe
from config import Settings
from engine.devices import available_cores
from engine.versions import versions
from local_bench import PACKAGES

MARK = "mark.gpu"
OUTCOMES = {"errors": "error"}  # in the plural, where pytest has one
WORKERS = 12  # at most: tests mostly wait for one core that compiles a kernel
OPTIONS = ("-m", "gpu", "-q", "-rfE", "--tb=short", "--durations=15", "-p", "no:cacheprovider")


def run_tests(_: Settings) -> Iterator[Mapping[str, Any]]:
    """Run them and count. Raises BackendFailed when they did not run to their end."""
    # those files alone: the others may want packages that a GPU machine has no use for
    files = gpu_files(ROOT / "tests")
    workers = str(min(WORKERS, available_cores()))
    command = [sys.executable, "-m", "pytest", "-n", workers, *OPTIONS, *map(str, files)]
    lines = []
    # the CPU's side of a comparison is small: threads of many workers would only wait for another
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as tests:
        assert tests.stdout is not None
        for line in tests.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    counts = count(lines)
    if not counts.get("passed"):
        raise BackendFailed(f"no GPU test passed: pytest ended with code {tests.returncode}")
    yield {
        "tests": counts,
        "failed_tests": counts.get("failed", 0) + counts.get("error", 0),
        "device": describe("cuda"),
        "versions": versions(PACKAGES),
    }


def gpu_files(folder: Path) -> list[Path]:
    """Test files in which a test asks for a GPU."""
    return sorted(path for path in folder.rglob("test_*.py") if MARK in path.read_text())


def count(lines: Iterable[str]) -> dict[str, int]:
    """What the last line of pytest says: outcome and number. Empty when there is no such line."""
    last = [line for line in lines if re.search(r" in \d+\.\d+s", line)][-1:]
    found = re.findall(r"(\d+) ([a-z]+)", "".join(last).partition(" in ")[0])
    return {OUTCOMES.get(outcome, outcome): int(number) for number, outcome in found}
