"""Our flags as the arguments of `sglang.Engine`, and those that it cannot honour. Pure.

The names are those of SGLang's ServerArgs, the same in 0.5.17 and 0.5.22. What is not named here is
SGLang's own choice.
"""

from __future__ import annotations

from typing import Any

from backend.interface import Unsupported
from backend.sglang.folder import ModelFolder
from config import BackendSettings, DeviceSettings, resolve_limits

# ATTN_IMPL -> SGLang's attention backend; None: its own choice. The kernels of sgl_kernel are those
# that it calls fa3.
ATTENTION: dict[str, str | None] = {
    "auto": None,
    "sdpa": "torch_native",
    "triton": "triton",
    "flash": "fa3",
    "flashinfer": "flashinfer",
    "sgl_kernel": "fa3",
}
WITHOUT_FLASH = "triton"  # what `auto` takes where it may take no flash kernel
FLASH = ("flash", "sgl_kernel")

LOAD_FORMATS = ("auto", "safetensors", "dummy")

# What SGLang keeps free: a prompt must be 7 positions shorter than its context and its pool, and a
# prompt of whole pages and its answer two pages shorter than the pool (`init_req_max_new_tokens`
# and `validate_input_length` of its scheduler, 0.5.17). We ask for that much more than we promise.
SPARE_CONTEXT = 7
SPARE_PAGES_AT_LEAST = 2


def spare_pages(page_tokens: int) -> int:
    """Pages that SGLang has beyond those that we promise."""
    return max(SPARE_PAGES_AT_LEAST, -(-SPARE_CONTEXT // page_tokens))


def refuse_unserved(settings: BackendSettings) -> None:
    """Raise Unsupported, naming the flag, for what SGLang does not do or we do not ask it for."""
    device, model = settings.device, settings.model
    if device.device not in ("auto", "cuda"):
        raise Unsupported(
            f"DEVICE={device.device}: the backend sglang runs on CUDA devices; "
            "use BACKEND_IMPL=hf, or DEVICE=cuda"
        )
    if model.load_format not in LOAD_FORMATS:
        raise Unsupported(
            f"LOAD_FORMAT={model.load_format}: the backend sglang loads "
            f"{', '.join(LOAD_FORMATS)}; use BACKEND_IMPL=hf"
        )
    if device.attention in FLASH and not device.flash:
        raise Unsupported(
            f"ATTN_IMPL={device.attention} and ENABLE_FLASH_ATTENTION=0 exclude each other"
        )
    if device.deterministic and device.compile_model:
        raise Unsupported(
            "COMPILE_MODEL=1 and DETERMINISTIC=1 exclude each other: unset one of them"
        )
    if device.deterministic and device.attention == "sdpa":
        raise Unsupported(
            "ATTN_IMPL=sdpa does not give the same bits in any batch: with DETERMINISTIC=1 use "
            "flash, triton, flashinfer or auto"
        )


def engine_arguments(
    settings: BackendSettings, model: ModelFolder, log_level: str
) -> dict[str, Any]:
    """What `sglang.Engine` is started with. Raises Unsupported naming a flag."""
    refuse_unserved(settings)
    device, cache = settings.device, settings.cache
    limits = resolve_limits(settings.batch, "cuda")
    pages = -(-limits.max_step_tokens // cache.page_tokens)  # it wants whole ones
    return {
        "model_path": str(model.path),
        "skip_tokenizer_init": True,  # ids in, ids out
        "incremental_streaming_output": True,  # what is new, not all so far
        "batch_notify_size": limits.max_running,  # the news of a step together
        "load_format": settings.model.load_format,
        "dtype": settings.model.dtype,
        "trust_remote_code": settings.model.trust_remote_code,
        "context_length": _context(settings.model.max_model_len, model),
        "tp_size": device.tensor_parallel,
        "attention_backend": _attention(device),
        "disable_cuda_graph": not device.cuda_graph,
        "enable_torch_compile": device.compile_model,
        "enable_deterministic_inference": device.deterministic,
        "mem_fraction_static": device.memory_fraction,
        "max_total_tokens": _capacity(cache.budget_tokens, cache.page_tokens),
        "page_size": cache.page_tokens,
        "disable_radix_cache": not cache.prefix,
        "max_running_requests": limits.max_running,
        "chunked_prefill_size": pages * cache.page_tokens,
        "log_level": log_level,
    }


def _attention(device: DeviceSettings) -> str | None:
    if device.attention == "auto" and not device.flash:
        return WITHOUT_FLASH
    return ATTENTION[device.attention]


def _context(asked: int, model: ModelFolder) -> int | None:
    """SGLang's context, with what it keeps free; None: the model's own."""
    if model.context is not None and asked > model.context:
        raise Unsupported(f"MAX_MODEL_LEN={asked} exceeds the model's context of {model.context}")
    if not asked or (model.context is not None and asked + SPARE_CONTEXT > model.context):
        return None
    return asked + SPARE_CONTEXT


def _capacity(budget: int, page_tokens: int) -> int | None:
    """Tokens of the pool; None: what MEMORY_FRACTION leaves."""
    if not budget:
        return None
    return (max(1, budget // page_tokens) + spare_pages(page_tokens)) * page_tokens
