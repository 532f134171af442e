"""Opens the native backend: from settings to a loaded model on its pages, behind the scheduler."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch

from backend.cache import PrefixCache
from backend.hf.attention import ATTENTION, AttentionSetup, PagedAttention
from backend.hf.executor import HfExecutor
from backend.hf.loading.resolve import ModelFiles, resolve
from backend.hf.memory import page_budget, return_heap
from backend.hf.models import CausalModel, config_value, positive
from backend.hf.models.decoder import Decoder, Placing
from backend.hf.models.registry import architecture, decoder_shape
from backend.hf.models.torch_blocks import TorchBlocks
from backend.hf.precision import Precision, choose_precision
from backend.interface import Backend, BackendSpec, StepExecutor, Unsupported
from config import BackendSettings, DeviceSettings, ModelSettings, get_device

logger = logging.getLogger(__name__)


def open_backend(
    settings: BackendSettings, scheduler: Callable[[StepExecutor], Backend]
) -> Backend:
    """Load the model and hand its executor to `scheduler`. Raises StartFailed with one line."""
    started = time.monotonic()
    device = _choose_device(settings.device)
    files = resolve(settings.model)
    context = _context(settings.model, files)
    precision = choose_precision(settings.model.dtype, device)
    model = _load_model(files, settings.model, precision, device, context)
    return_heap()
    page_tokens = settings.cache.page_tokens
    kv_bytes = model.geometry.layers * model.geometry.row * precision.compute.itemsize
    tokens = page_budget(settings, kv_bytes, context, device)
    pages = max(1, tokens // page_tokens)
    attention, name = _open_attention(settings.device, model, pages, page_tokens, precision, device)
    spec = BackendSpec(
        name="hf",
        model=settings.model.served_name,
        folder=str(files.folder),
        vocabulary=model.vocabulary,
        max_model_len=context,
        stop_ids=files.end_ids,
        page_tokens=page_tokens,
        pages=pages,
        max_running=settings.batch.max_running,
        max_step_tokens=settings.batch.max_step_tokens,
        depth=1,
        device=device,
        dtype=str(precision.weights).removeprefix("torch."),
        attention=name,
        parameters=model.parameters,
        weight_bytes=model.weight_bytes,
        kv_bytes_per_token=kv_bytes,
    )
    cache = PrefixCache(pages, page_tokens, settings.cache.prefix)
    logger.info(
        "%s ready in %.1f s: %.1f M parameters, %s pages of %d tokens (%.0f MiB of KV)",
        architecture(files.config),
        time.monotonic() - started,
        model.parameters / 1e6,
        f"{pages:,}",
        page_tokens,
        pages * page_tokens * kv_bytes / 2**20,
    )
    return scheduler(HfExecutor(spec, cache, model, attention))


def _choose_device(settings: DeviceSettings) -> str:
    device: str = settings.device
    if device == "auto":
        device = get_device()
        logger.info("DEVICE=auto: %s", device)
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present[device]:
        raise Unsupported(f"DEVICE={device} is not there, as this torch sees it: use DEVICE=auto")
    return device


def _context(settings: ModelSettings, files: ModelFiles) -> int:
    """Tokens of prompt and answer: the model's own number, or less by MAX_MODEL_LEN."""
    text = config_value(files.config, "text_config", dict, files.config)
    keys = [key for key in ("max_position_embeddings", "n_positions") if text.get(key) is not None]
    if not keys and not settings.max_model_len:
        raise Unsupported(f"{files.folder} does not say its context: set MAX_MODEL_LEN")
    own = positive(text, keys[0], int) if keys else settings.max_model_len
    if settings.max_model_len > own:
        raise Unsupported(
            f"MAX_MODEL_LEN={settings.max_model_len} exceeds the model's context of {own}"
        )
    return settings.max_model_len or own


def _load_model(
    files: ModelFiles, settings: ModelSettings, precision: Precision, device: str, context: int
) -> CausalModel:
    """Our own decoder where it knows the architecture, transformers' modelling code elsewhere."""
    shape = decoder_shape(files.config)
    if shape is not None:
        with files.open_weights() as weights:
            blocks = TorchBlocks(precision, device)
            placing = Placing(device, precision, context)
            return Decoder(shape, files.config, weights, blocks, placing)
    logger.info("%s runs through transformers' own code", architecture(files.config))
    from backend.hf.models.transformers_model import build_transformers_model  # seconds to import

    return build_transformers_model(
        files.folder,
        files.config,
        precision.compute,
        device,
        settings.trust_remote_code,
        files.made_up,
        context,
    )


def _open_attention(
    settings: DeviceSettings,
    model: CausalModel,
    pages: int,
    page_tokens: int,
    precision: Precision,
    device: str,
) -> tuple[PagedAttention, str]:
    """The attention that `ATTN_IMPL` names, with its pool, and its name."""
    name = _choose_attention(settings.attention, device)
    module, kind = ATTENTION[name].split(":")
    setup = AttentionSetup(model.geometry, pages, page_tokens, precision.compute, device)
    opened: PagedAttention = getattr(import_module(module), kind)(setup)
    return opened, name


def _choose_attention(name: str, device: str) -> str:
    """`auto` takes triton where it runs, and says why; triton by name is refused elsewhere."""
    lack = _triton_lacks(device)
    if name == "auto":
        name = "triton" if lack is None else "sdpa"
        logger.info("ATTN_IMPL=auto: %s, as %s", name, lack or "this device runs our kernels")
    elif name == "triton" and lack is not None:
        raise Unsupported(
            "ATTN_IMPL=triton needs a CUDA device of compute capability 8.0 or later and the "
            f"package triton, but {lack}: use ATTN_IMPL=sdpa"
        )
    return name


def _triton_lacks(device: str) -> str | None:
    """Why our Triton kernels cannot run on `device`. None: they can."""
    if device != "cuda":
        return f"DEVICE is {device}"
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "this device has compute capability {}.{}".format(*capability)
    return None
