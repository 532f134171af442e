"""Opens backends over one folder: the one under test, and the native one as its oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from backend.interface import Submission
from config import BackendSettings, BatchSettings, CacheSettings, DeviceSettings, ModelSettings
from engine.opening import open_backend
from tests.conformance.driver import Answer, Driver


def settings_of(
    folder: Path,
    *,
    impl: Any = "mlx",
    dtype: Any = "float32",
    page_tokens: int = 4,
    pages: int = 64,
    prefix: bool = True,
    max_running: int = 8,
    max_step_tokens: int = 64,
) -> BackendSettings:
    return BackendSettings(
        impl=impl,
        model=ModelSettings(local_dir=str(folder), dtype=dtype),
        device=DeviceSettings(device="cpu"),
        cache=CacheSettings(
            page_tokens=page_tokens, budget_tokens=pages * page_tokens, prefix=prefix
        ),
        batch=BatchSettings(max_running=max_running, max_step_tokens=max_step_tokens),
    )


def opened(folder: Path, **knobs: Any) -> Driver:
    return Driver(open_backend(settings_of(folder, **knobs)))


def native_answers(folder: Path, *submissions: Submission) -> list[Answer]:
    """What the native backend makes of them, in float32."""
    return opened(folder, impl="hf").run(*submissions)


def edited_copy(folder: Path, target: Path, **config: Any) -> Path:
    """A folder of the same weights, with other words in its config.json; None takes a word out."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    words = json.loads(path.read_text()) | config
    path.write_text(json.dumps({name: each for name, each in words.items() if each is not None}))
    return target
