"""What a client of a server on another machine needs loads without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "numpy")


@pytest.mark.parametrize(
    "modules",
    ["bench.workloads, bench.summary, bench.card, bench.progress, bench.script", "local_bench"],
)
def test_it_loads_without_torch(root: Path, modules: str) -> None:
    code = f"import sys, {modules}; print(*[name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert loaded.stdout.strip() == ""
