"""Opens the native backend: from settings to a loaded model on its pages, behind the scheduler."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from backend.cache import PrefixCache
from backend.hf.attention import AttentionSetup, KvGeometry
from backend.hf.attention.choice import ATTENTION, choose_attention, lack, open_attention
from backend.hf.executor import HfExecutor
from backend.hf.loading.resolve import ModelFiles, context_length, resolve
from backend.hf.memory import NO_PEAK, measure_peak, page_budget, return_heap
from backend.hf.models import CausalModel
from backend.hf.models.blocks import Blocks
from backend.hf.models.decoder import Decoder, DecoderShape, Placing
from backend.hf.models.registry import architecture, decoder_shape
from backend.hf.models.torch_blocks import TorchBlocks
from backend.hf.precision import choose_precision
from backend.interface import Backend, BackendSpec, StepExecutor, Unsupported
from config import BackendSettings, DeviceSettings, get_device, resolve_limits

logger = logging.getLogger(__name__)

DEPTH = {"cuda": 2}  # steps in flight; elsewhere a step is over when it is launched


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and what was decided about it, before there are pages."""

    model: CausalModel
    files: ModelFiles
    placing: Placing
    attention: str
    kernels: bool  # ours run on this device
    graphs: Decoder | None  # the model, where its steps run by CUDA graphs
    kv_bytes: int  # of one token in all layers


def open_backend(
    settings: BackendSettings, scheduler: Callable[[StepExecutor], Backend]
) -> Backend:
    """Load the model and hand its executor to `scheduler`. Raises StartFailed with one line."""
    started = time.monotonic()
    loaded = _load(settings)
    context, device = loaded.placing.context, loaded.placing.device
    page_tokens = settings.cache.page_tokens
    peak = NO_PEAK
    if device == "cuda":
        spec = _spec(settings, loaded, pages=-(-context // page_tokens))
        peak = measure_peak(
            lambda: _open_executor(settings, loaded, spec, pages=1),
            None if loaded.graphs is None else loaded.graphs.shape,
        )
    tokens = page_budget(settings, loaded.kv_bytes, context, device, peak)
    spec = _spec(settings, loaded, pages=max(1, tokens // page_tokens))
    executor = _open_executor(settings, loaded, spec, spec.pages, loaded.graphs)
    logger.info(
        "%s ready in %.1f s: %.1f M parameters, %s pages of %d tokens (%.0f MiB of KV)",
        architecture(loaded.files.config),
        time.monotonic() - started,
        spec.parameters / 1e6,
        f"{spec.pages:,}",
        page_tokens,
        spec.pages * page_tokens * loaded.kv_bytes / 2**20,
    )
    return scheduler(executor)


def _open_executor(
    settings: BackendSettings,
    loaded: Loaded,
    spec: BackendSpec,
    pages: int,
    graphs: Decoder | None = None,
) -> HfExecutor:
    """An executor over so many pages, which may be fewer than its spec says."""
    setup = AttentionSetup(
        geometry=loaded.model.geometry,
        pages=pages,
        page_tokens=spec.page_tokens,
        dtype=loaded.placing.precision.compute,
        device=spec.device,
        deterministic=settings.device.deterministic,
    )
    cache = PrefixCache(pages, spec.page_tokens, settings.cache.prefix)
    attention = open_attention(loaded.attention, setup)
    return HfExecutor(spec, cache, loaded.model, attention, loaded.kernels, graphs)


def _spec(settings: BackendSettings, loaded: Loaded, pages: int) -> BackendSpec:
    placing = loaded.placing
    limits = resolve_limits(settings.batch, placing.device)
    return BackendSpec(
        name="hf",
        model=settings.model.served_name,
        folder=str(loaded.files.folder),
        vocabulary=loaded.model.vocabulary,
        max_model_len=placing.context,
        stop_ids=loaded.files.end_ids,
        page_tokens=settings.cache.page_tokens,
        pages=pages,
        max_running=limits.max_running,
        max_step_tokens=limits.max_step_tokens,
        depth=DEPTH.get(placing.device, 1),
        device=placing.device,
        dtype=str(placing.precision.weights).removeprefix("torch."),
        attention=loaded.attention,
        parameters=loaded.model.parameters,
        weight_bytes=loaded.model.weight_bytes,
        kv_bytes_per_token=loaded.kv_bytes,
    )


def _load(settings: BackendSettings) -> Loaded:
    started = time.monotonic()
    if settings.device.tensor_parallel > 1:
        raise Unsupported(
            f"TENSOR_PARALLEL_SIZE={settings.device.tensor_parallel}: the backend hf runs on one "
            "device; use BACKEND_IMPL=sglang or TENSOR_PARALLEL_SIZE=1"
        )
    device = _choose_device(settings.device)
    files = resolve(settings.model)
    placing = Placing(
        device,
        choose_precision(settings.model.dtype, device),
        context_length(settings.model, files.config, files.folder),
    )
    shape = decoder_shape(files.config)
    own: Decoder | None
    model: CausalModel
    if shape is None:
        model, own = _load_foreign(files, settings, placing), None
        attention = _attention(settings.device, placing, model.geometry)
    else:  # what cannot run is refused before the weights are read
        attention = _attention(settings.device, placing, shape.geometry)
        model = own = _load_own(files, settings.device, shape, placing)
    return_heap()
    logger.info("weights are there after %.1f s", time.monotonic() - started)
    geometry, compute = model.geometry, placing.precision.compute
    kernels = lack("triton", device, compute, geometry) is None
    capturable = kernels and ATTENTION[attention].capturable
    graphs = own if capturable and settings.device.cuda_graph else None
    kv_bytes = geometry.layers * geometry.row * compute.itemsize
    return Loaded(model, files, placing, attention, kernels, graphs, kv_bytes)


def _attention(settings: DeviceSettings, placing: Placing, geometry: KvGeometry) -> str:
    return choose_attention(settings, placing.device, placing.precision.compute, geometry)


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


def _load_own(
    files: ModelFiles, settings: DeviceSettings, shape: DecoderShape, placing: Placing
) -> Decoder:
    """A model that our own decoder knows."""
    blocks = _blocks(settings, shape, placing)
    with files.open_weights() as weights:
        return Decoder(shape, files.config, weights, blocks, placing)


def _blocks(settings: DeviceSettings, shape: DecoderShape, placing: Placing) -> Blocks:
    """Our kernels where they run, torch's operations elsewhere; or those compiled, when asked."""
    precision, device = placing.precision, placing.device
    if settings.compile_model:
        if settings.deterministic:
            raise Unsupported(
                "COMPILE_MODEL=1 and DETERMINISTIC=1 exclude each other: unset one of them"
            )
        from backend.hf.models.compiled_blocks import compiled_blocks  # loads the compiler

        return compiled_blocks(precision, device)
    if lack("triton", device, precision.compute, shape.geometry) is not None:
        return TorchBlocks(precision, device)
    from backend.hf.models.triton_blocks import TritonBlocks  # triton is there with CUDA only

    return TritonBlocks(precision, device, settings.deterministic)


def _load_foreign(files: ModelFiles, settings: BackendSettings, placing: Placing) -> CausalModel:
    """Any other model, by transformers' modelling code."""
    name = architecture(files.config)
    if settings.device.deterministic or settings.device.compile_model:
        raise Unsupported(
            f"{name} runs through transformers' own code, which knows neither DETERMINISTIC=1 nor "
            "COMPILE_MODEL=1: unset them"
        )
    logger.info("%s runs through transformers' own code", name)
    from backend.hf.models.transformers_model import build_transformers_model  # seconds to import

    return build_transformers_model(
        files.folder,
        files.config,
        placing.precision.compute,
        placing.device,
        settings.model.trust_remote_code,
        files.made_up,
        placing.context,
    )
