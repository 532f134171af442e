"""Schemathesis over /openapi.json: whatever it asks is answered soon, as described, and no 5xx."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is in requirements-clients.txt")

HERE = Path(__file__).resolve().parent
EXAMPLES = 50  # for each operation
SEED = 20261130
HANG_S = 30  # no answer by then is a hang: the fake backend's longest takes one or two
PATIENCE_S = 600
# Bodies are checked beyond what a schema can say (fields that exclude each other), so that a good
# one may be refused; and a field that a schema forbids to be null may be null.
BEYOND_THE_SCHEMA = "negative_data_rejection,positive_data_acceptance"


def test_every_operation_answers_all_that_is_thrown_at_it(
    fake_server: str, model: str, tmp_path: Path
) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{fake_server}/openapi.json"),
        *("--max-examples", str(EXAMPLES), "--seed", str(SEED), "--phases", "fuzzing"),
        *("--request-timeout", str(HANG_S), "--exclude-checks", BEYOND_THE_SCHEMA),
        *("--workers", "1", "--no-shrink", "--continue-on-failure", "--no-color"),
        *("--generation-database", "none", "--warnings", "off"),
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(HERE)}
    environment = {**os.environ, **hooks, "FUZZ_SERVER": fake_server, "FUZZ_MODEL": model}
    found = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert found.returncode == 0, found.stdout + found.stderr
