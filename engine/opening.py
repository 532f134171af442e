"""Which backend runs: the table of names, what each needs, and the one place that opens them."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from backend.interface import Backend, Unsupported
from config import BackendSettings, calm_openmp
from engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend."""

    opener: str  # module:function, imported when chosen; takes the settings and the scheduler class
    package: str | None = None  # what it needs beyond our dependencies; the extra has our name


BACKENDS: dict[str, Choice] = {
    "hf": Choice("backend.hf.opening:open_backend"),
    "sglang": Choice("backend.sglang.opening:open_backend", "sglang"),
    "mlx": Choice("backend.mlx.opening:open_backend", "mlx_lm"),
    "fake": Choice("backend.fake:open_backend"),
}


def open_backend(settings: BackendSettings) -> Backend:
    """Load the backend that `BACKEND_IMPL` names. Raises StartFailed with one line."""
    name: str = settings.impl
    if name == "auto":
        name, why = _best()
        logger.info("BACKEND_IMPL=auto: %s, as %s", name, why)
    choice = BACKENDS[name]
    if choice.package is not None and find_spec(choice.package) is None:
        raise Unsupported(
            f"BACKEND_IMPL={name} needs the package {choice.package}, which is not installed: "
            f'pip install "mini-sglang[{name}]", or use BACKEND_IMPL=auto'
        )
    calm_openmp()  # before the backend brings torch
    module, opener = choice.opener.split(":")
    backend: Backend = getattr(import_module(module), opener)(settings, Scheduler)
    return backend


def _best() -> tuple[str, str]:
    """The backend that is fastest here, and why. By docs/benchmarks.md the native one is on CUDA
    and on a CPU.
    """
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return "hf", "the native torch backend is the fastest on this machine"
    if find_spec("mlx_lm") is None:
        return "hf", 'mlx-lm is not installed (pip install "mini-sglang[mlx]")'
    return "mlx", "this is Apple silicon and mlx-lm is installed"
