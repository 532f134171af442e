"""How many tokens of KV fit."""

from __future__ import annotations

import psutil
import torch

from backend.interface import StartFailed
from config import BackendSettings

CPU_SHARE = 0.25  # of a machine's memory that the pages may fill: other programs live there too


def page_budget(settings: BackendSettings, kv_bytes: int, context: int, device: str) -> int:
    """Tokens of KV to make room for, when each takes `kv_bytes` in all layers.

    PAGE_TOKEN_BUDGET where given; else MEMORY_FRACTION of what is free now, the weights being
    loaded, but no more than every row of a batch can fill. Raises StartFailed when not one page
    fits.
    """
    if settings.cache.budget_tokens:
        return max(settings.cache.budget_tokens, settings.cache.page_tokens)
    free = int(_free_bytes(device) * settings.device.memory_fraction)
    tokens = min(free // kv_bytes, settings.batch.max_running * context)
    if tokens < settings.cache.page_tokens:
        raise StartFailed(
            f"{free / 2**20:.0f} MiB of memory hold no page of "
            f"{settings.cache.page_tokens * kv_bytes / 2**20:.0f} MiB: free some, "
            "or lower PAGE_SIZE_TOKENS"
        )
    return tokens


def _free_bytes(device: str) -> int:
    """Bytes that are free and ours to take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available * CPU_SHARE)
