"""Opens SGLang as a backend: from settings to a runtime that serves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from backend.interface import Backend, BackendSpec, StepExecutor, Unsupported
from backend.sglang.arguments import SPARE_CONTEXT, engine_arguments, spare_pages
from backend.sglang.backend import SglangBackend
from backend.sglang.books import Books
from backend.sglang.bridge import Bridge, Facts
from backend.sglang.fields import LACKS as LACKS, Requests, lacks
from backend.sglang.folder import ModelFolder, find_model
from config import BackendSettings

logger = logging.getLogger(__name__)


def open_backend(settings: BackendSettings, _: Callable[[StepExecutor], Backend]) -> Backend:
    """Start SGLang's processes and wait until they serve. Raises StartFailed with one line, and
    then none of them is left. It schedules by itself: the scheduler that is handed in has no use.
    """
    started = time.monotonic()
    model = find_model(settings.model)
    bridge = Bridge(engine_arguments(settings, model, log_level()))
    try:
        spec = make_spec(settings, model, bridge.facts)
    except BaseException:
        bridge.close()
        raise
    logger.info(
        "SGLang is ready in %.1f s: attention by %s, %s pages of %d tokens",
        time.monotonic() - started,
        spec.attention,
        f"{spec.pages:,}",
        spec.page_tokens,
    )
    deterministic = settings.device.deterministic
    requests = Requests(spec.vocabulary, bridge.facts.end_ids, deterministic)
    return SglangBackend(spec, bridge, Books(spec, bridge.facts.prefix), requests)


def log_level() -> str:
    """What its processes log: as other people's loggers here, from WARNING on; with LOG_LEVEL=DEBUG
    their own reports as well.
    """
    ours = logger.getEffectiveLevel()
    if ours <= logging.DEBUG:
        return "info"
    return logging.getLevelName(max(ours, logging.WARNING)).lower()


def make_spec(settings: BackendSettings, model: ModelFolder, facts: Facts) -> BackendSpec:
    """What SGLang decided, less what it keeps free. Raises Unsupported where that is not enough."""
    _refuse_others(settings, facts)
    size, budget = settings.cache.page_tokens, settings.cache.budget_tokens
    pages = facts.tokens // size - spare_pages(size)
    if pages < max(1, budget // size):
        asked = f"PAGE_TOKEN_BUDGET={budget}" if budget else "one page"
        raise Unsupported(
            f"{asked} does not fit: SGLang has room for {max(0, pages) * size:,} tokens beside the "
            "weights; lower it, or raise MEMORY_FRACTION"
        )
    own = facts.context - SPARE_CONTEXT
    return BackendSpec(
        name="sglang",
        model=settings.model.served_name,
        folder=str(model.path),
        vocabulary=facts.vocabulary,
        max_model_len=min(settings.model.max_model_len or own, own),
        stop_ids=model.end_ids,
        page_tokens=size,
        pages=pages,
        max_running=facts.max_running,
        max_step_tokens=facts.max_step_tokens,
        depth=1,
        device="cuda",
        dtype=facts.dtype,
        attention=facts.attention,
        lacks=lacks(settings.device.deterministic),
    )


def _refuse_others(settings: BackendSettings, facts: Facts) -> None:
    """Raise Unsupported where SGLang took something else than it was asked for: some kinds of
    attention want pages of their own, and some keep no prefixes with DETERMINISTIC=1.
    """
    if facts.page_tokens != settings.cache.page_tokens:
        raise Unsupported(
            f"PAGE_SIZE_TOKENS={settings.cache.page_tokens}: SGLang's attention {facts.attention} "
            f"has pages of {facts.page_tokens}: set that, or another ATTN_IMPL"
        )
    if settings.cache.prefix and not facts.prefix:
        raise Unsupported(
            f"PREFIX_CACHE=1: SGLang keeps no prefixes here, with its attention {facts.attention}: "
            "set PREFIX_CACHE=0, or another ATTN_IMPL"
        )
