"""How many tokens of KV fit. mlx's memory is the machine's, so others live in it too."""

from __future__ import annotations

import logging

import psutil

from backend.interface import StartFailed
from backend.mlx import library
from config import BackendSettings, resolve_limits

logger = logging.getLogger(__name__)

CPU_SHARE = 0.25  # of what is free that pages may fill, as with the native backend
GPU_SHARE = 0.5  # likewise: caches are copied when the rows of a batch change
MIB = 1 << 20


def page_budget(settings: BackendSettings, token_bytes: int, context: int, device: str) -> int:
    """Tokens to make room for, when each takes `token_bytes` in all layers: PAGE_TOKEN_BUDGET where
    given, else MEMORY_FRACTION of a share of what is free, the weights being loaded, but no more
    than every row of a batch can fill.

    Raises StartFailed when that is more than there is, or holds no page.
    """
    cache = settings.cache
    most = resolve_limits(settings.batch, device).max_running * context
    if not token_bytes:  # a state of fixed size: pages count positions, and measure nothing
        return cache.budget_tokens or most
    free, share = _free(device)
    if cache.budget_tokens:
        budget = max(cache.budget_tokens, cache.page_tokens)
        if budget * token_bytes > free:
            fits = free // token_bytes // cache.page_tokens * cache.page_tokens
            raise StartFailed(
                f"PAGE_TOKEN_BUDGET={cache.budget_tokens} takes {_mib(budget * token_bytes)}, "
                f"{_mib(free)} are available: lower it to {fits}, or free some"
            )
        return int(budget)
    fraction = settings.device.memory_fraction
    room = int(free * share * fraction)
    account = f"MEMORY_FRACTION={fraction:g} of {share:g} of {_mib(free)}"
    logger.info("%s for pages: %s", _mib(room), account)
    tokens = min(room // token_bytes, most)
    if tokens < cache.page_tokens:
        raise StartFailed(
            f"{_mib(room)} of memory hold no page of {cache.page_tokens} tokens, "
            f"{_mib(cache.page_tokens * token_bytes)} ({account}): free some, or lower "
            "PAGE_SIZE_TOKENS"
        )
    return tokens


def _free(device: str) -> tuple[int, float]:
    """Bytes that are free for this process, and the share of them that pages may fill."""
    if device == "mps":
        return max(0, library.recommended_bytes() - library.active_bytes()), GPU_SHARE
    return int(psutil.virtual_memory().available), CPU_SHARE


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
