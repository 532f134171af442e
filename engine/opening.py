"""Which backend runs: the table of names, and the one place that opens them."""

from __future__ import annotations

import logging
from importlib import import_module

from backend.interface import Backend
from config import BackendSettings, calm_openmp
from engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

BACKENDS: dict[str, str] = {
    "hf": "backend.hf.opening:open_backend",
    "fake": "backend.fake:open_backend",
}


def open_backend(settings: BackendSettings) -> Backend:
    """Load the backend that `BACKEND_IMPL` names. Raises StartFailed with one line."""
    name = settings.impl
    if name == "auto":
        name = "hf"
        logger.info("BACKEND_IMPL=auto: hf, the native torch backend")
    calm_openmp()  # before the backend brings torch
    module, opener = BACKENDS[name].split(":")
    backend: Backend = getattr(import_module(module), opener)(settings, Scheduler)
    return backend
