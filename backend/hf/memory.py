"""How many tokens of KV fit."""

from __future__ import annotations

import ctypes

import psutil
import torch

from backend.interface import StartFailed
from config import BackendSettings

CPU_SHARE = 0.25  # of a machine's memory that the pages may fill: other programs live there too


def page_budget(settings: BackendSettings, kv_bytes: int, context: int, device: str) -> int:
    """Tokens of KV to make room for, when each takes `kv_bytes` in all layers.

    PAGE_TOKEN_BUDGET where given; else MEMORY_FRACTION of what is free now, the weights being
    loaded, but no more than every row of a batch can fill. Raises StartFailed when that is more
    than there is, or not one page fits.
    """
    available = _available_bytes(device)
    if settings.cache.budget_tokens:
        budget = max(settings.cache.budget_tokens, settings.cache.page_tokens)
        if budget * kv_bytes > available:
            raise StartFailed(
                f"PAGE_TOKEN_BUDGET={settings.cache.budget_tokens} takes "
                f"{budget * kv_bytes / 2**20:,.0f} MiB, {available / 2**20:,.0f} MiB are "
                f"available: lower it to {available // kv_bytes} or less"
            )
        return budget
    share = 1.0 if device == "cuda" else CPU_SHARE
    free = int(available * share * settings.device.memory_fraction)
    tokens = min(free // kv_bytes, settings.batch.max_running * context)
    if tokens < settings.cache.page_tokens:
        raise StartFailed(
            f"{free / 2**20:.0f} MiB of memory hold no page of "
            f"{settings.cache.page_tokens * kv_bytes / 2**20:.0f} MiB: free some, "
            "or lower PAGE_SIZE_TOKENS"
        )
    return tokens


def return_heap() -> None:
    """Give the holes that loading left in the heap back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _available_bytes(device: str) -> int:
    """Bytes that can be taken without pushing anything out."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)
