"""Opens the backend over mlx-lm: from settings to a loaded model and the books of its memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from backend.interface import Backend, BackendSpec, StepExecutor, Unsupported, first_line
from backend.mlx.folder import ModelFolder, load_failed, read_folder
from config import BackendSettings, DeviceSettings, resolve_limits

if TYPE_CHECKING:
    from backend.mlx.library import Shape

logger = logging.getLogger(__name__)

LACKS: tuple[str, ...] = ("pooling",)
DEPTH = 2  # mlx-lm draws the next token while it hands out the last


def open_backend(
    settings: BackendSettings, scheduler: Callable[[StepExecutor], Backend]
) -> Backend:
    """Load the model. mlx-lm batches by itself, so `scheduler` has nothing to do. Raises
    StartFailed with one line.
    """
    started = time.monotonic()
    refuse_flags(settings.device)
    folder = read_folder(settings.model)
    try:  # seconds: mlx-lm brings transformers
        from backend.mlx import library
        from backend.mlx.backend import MlxBackend
        from backend.mlx.memory import page_budget
    except Exception as error:  # a missing Metal, a release of transformers that it does not know
        raise Unsupported(f"mlx-lm is installed and does not load: {first_line(error)}") from error
    device = choose_device(settings.device.device, library.has_metal())
    stream = library.open_stream(device)
    with library.computing(stream):
        try:
            model = library.load(
                folder.path, settings.model.dtype, folder.rotation, settings.model.trust_remote_code
            )
            shape = library.look_at(model, stream)
        except Exception as error:  # of any kind: what a folder may hold is not for us to know
            raise load_failed(folder.path, error) from error
    tokens = page_budget(settings, shape.token_bytes, folder.context, device)
    spec = _spec(settings, folder, device, shape, tokens)
    _tell(spec, time.monotonic() - started)
    return MlxBackend(model, spec, stream, settings.cache.prefix)


def _spec(
    settings: BackendSettings, folder: ModelFolder, device: str, shape: Shape, tokens: int
) -> BackendSpec:
    """`tokens`: positions that there is room for."""
    limits = resolve_limits(settings.batch, device)
    page_tokens = settings.cache.page_tokens
    return BackendSpec(
        name="mlx",
        model=settings.model.served_name,
        folder=str(folder.path),
        vocabulary=shape.vocabulary,
        max_model_len=folder.context,
        stop_ids=folder.end_ids,
        page_tokens=page_tokens,
        pages=max(1, tokens // page_tokens),
        max_running=limits.max_running,
        max_step_tokens=limits.max_step_tokens,
        depth=DEPTH,
        device=device,
        dtype=shape.dtype,
        attention="mlx",
        parameters=shape.parameters,
        weight_bytes=shape.weight_bytes,
        kv_bytes_per_token=shape.token_bytes,
        lacks=LACKS,
    )


def _tell(spec: BackendSpec, seconds: float) -> None:
    logger.info(
        "%s on %s ready in %.1f s: %.1f M parameters, %s pages of %d tokens (%.0f MiB of KV)",
        spec.model,
        spec.device,
        seconds,
        spec.parameters / 1e6,
        f"{spec.pages:,}",
        spec.page_tokens,
        spec.pages * spec.page_tokens * spec.kv_bytes_per_token / 2**20,
    )


def refuse_flags(device: DeviceSettings) -> None:
    """Raise Unsupported for a switch that means nothing here, naming it."""
    asked = {
        f"ATTN_IMPL={device.attention}": device.attention != "auto",
        f"TENSOR_PARALLEL_SIZE={device.tensor_parallel}": device.tensor_parallel > 1,
        "DETERMINISTIC=1": device.deterministic,
        "COMPILE_MODEL=1": device.compile_model,
        "DEVICE=cuda": device.device == "cuda",
    }
    for flag, given in asked.items():
        if given:
            raise Unsupported(f"{flag}: mlx-lm has no such thing: unset it, or BACKEND_IMPL=hf")


def choose_device(asked: str, metal: bool) -> str:
    """Where to run: the Apple GPU ("mps") where there is `metal`, unless DEVICE says otherwise.

    Raises Unsupported when it asks for one that is not there.
    """
    if asked == "mps" and not metal:
        raise Unsupported("DEVICE=mps: mlx finds no Apple GPU here; use DEVICE=auto")
    device = "mps" if metal and asked != "cpu" else "cpu"
    if asked == "auto":
        logger.info("DEVICE=auto: %s", device)
    return device
