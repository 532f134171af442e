"""Measurements as a part has them, of nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from backend.interface import BackendFailed
from config import Settings


def two_results(settings: Settings) -> Iterator[Mapping[str, Any]]:
    yield {"rows": settings.backend.batch.max_running}
    sys.stdout.write("a line for the reader\n")
    yield {"batch1_ms_per_token": 1.0, "runs": [1.0, 2.0]}


def breaks(settings: Settings) -> Iterator[Mapping[str, Any]]:
    yield {"before": settings.backend.model.local_dir}
    raise BackendFailed("it broke")


def hangs(_: Settings) -> Iterator[Mapping[str, Any]]:
    yield {"before": 1}
    time.sleep(600)
