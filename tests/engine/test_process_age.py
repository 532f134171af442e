"""How long a process has been alive."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def test_the_age_of_a_process_counts_what_was_before_the_import(root: Path) -> None:
    code = "import time; time.sleep(0.3); from engine.process_age import process_age; "
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"{code} print(process_age())"],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
    )
    tick = 0.02  # the kernel counts in hundredths
    assert 0.3 <= float(done.stdout) <= time.monotonic() - start + tick
