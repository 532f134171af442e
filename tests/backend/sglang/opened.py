"""The adapter over a double of SGLang, as its tests open it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backend.interface import Backend, StepExecutor
from backend.sglang.backend import SglangBackend
from backend.sglang.opening import open_backend
from config import BackendSettings, BatchSettings, CacheSettings, DeviceSettings, ModelSettings
from tests.conformance.cases import SHAPE
from tests.conformance.driver import Driver


def write_folder(folder: Path, **config: Any) -> Path:
    """A model folder as LOAD_FORMAT=dummy wants it."""
    folder.mkdir(exist_ok=True)
    text = json.dumps({**SHAPE, "architectures": ["LlamaForCausalLM"], **config})
    (folder / "config.json").write_text(text)
    return folder


def settings(
    folder: Path,
    deterministic: bool = True,
    pages: int = 64,
    page_tokens: int = 4,
    max_running: int = 8,
    max_step_tokens: int = 64,
    prefix: bool = True,
    **model: Any,
) -> BackendSettings:
    return BackendSettings(
        impl="sglang",
        model=ModelSettings(**{"local_dir": str(folder), "load_format": "dummy", **model}),
        device=DeviceSettings(deterministic=deterministic),
        cache=CacheSettings(
            page_tokens=page_tokens, budget_tokens=pages * page_tokens, prefix=prefix
        ),
        batch=BatchSettings(max_running=max_running, max_step_tokens=max_step_tokens),
    )


def no_scheduler(_: StepExecutor) -> Backend:
    raise AssertionError("SGLang schedules by itself")


def open_sglang(given: BackendSettings) -> SglangBackend:
    backend = open_backend(given, no_scheduler)
    assert type(backend) is SglangBackend
    return backend


@contextmanager
def driven(given: BackendSettings) -> Iterator[Driver]:
    """A driver, and nothing left of it."""
    driver = Driver(open_sglang(given))
    try:
        yield driver
    finally:
        driver.backend.close()
