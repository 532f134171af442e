"""How many tokens of KV fit: what is free now, and on a CUDA device what the largest steps take."""

from __future__ import annotations

import ctypes
import gc
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import psutil
import torch

from backend.hf.forecast import (
    SCORED_ROWS,
    CudaMemory,
    Peak,
    count_tokens,
    cpu_room,
    cuda_room,
    graph_reserve,
    mib,
)
from backend.interface import (
    MAX_TOP_LOGPROBS,
    BackendSpec,
    Chunk,
    SamplingParams,
    SlotSetup,
    StartFailed,
    StepExecutor,
    StepPlan,
)
from config import BackendSettings, resolve_limits

if TYPE_CHECKING:
    from backend.hf.models.decoder import DecoderShape

logger = logging.getLogger(__name__)

NO_PEAK = Peak(0, 0, 0, 0)
# How torch's allocator, the driver and cuBLAS, for its workspaces, say so.
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
DRAWN = SamplingParams(temperature=1.0)
# All that a draw can be asked for: filters, edits of the logits
DEMANDING = SamplingParams(
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.01,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    repetition_penalty=1.1,
)


class Allocator(Protocol):
    """Readings of a device's memory, in bytes."""

    def restart(self) -> None:
        """Give back what is cached, and forget the highest reading."""

    def allocated(self) -> int:
        """What tensors take now."""

    def highest(self) -> int:
        """At most since `restart`."""


class CudaAllocator:
    """torch's, on the current device."""

    def restart(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def highest(self) -> int:
        return torch.cuda.max_memory_allocated()


def page_budget(
    settings: BackendSettings, kv_bytes: int, context: int, device: str, peak: Peak = NO_PEAK
) -> int:
    """Tokens of KV to make room for, when each takes `kv_bytes` in all layers.

    PAGE_TOKEN_BUDGET where given; else what memory holds, the weights being loaded: see `cpu_room`,
    and `cuda_room`, which takes the measured `peak`. Raises StartFailed when the budget is more
    than there is, or nothing of use fits.
    """
    limits = resolve_limits(settings.batch, device)
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        room = cuda_room(settings, limits, context, CudaMemory(total, total - free, peak))
        logger.info("%s for pages: %s", mib(room.measured), room.account)
    else:
        free = int(psutil.virtual_memory().available)
        room = cpu_room(settings, limits, context, free)
    return count_tokens(settings, kv_bytes, room)


def measure_peak(
    open_executor: Callable[[], StepExecutor],
    graphed: DecoderShape | None,
    allocator: Allocator | None = None,
) -> Peak:
    """What the largest steps take beside weights and pages, measured by running them. `graphed`:
    the model's shape, where its steps are to run by CUDA graphs.

    `open_executor` opens one without graphs, over a single page, on which every sequence stands:
    what is computed does not matter. Its spec has the pages of a whole context at least, so that
    page tables have their real size. It is closed when this returns.

    Raises StartFailed when they do not fit.
    """
    allocator = allocator or CudaAllocator()
    started = time.monotonic()
    gc.collect()  # tensors in a cycle would be counted for whoever comes next
    allocator.restart()
    before = allocator.allocated()
    executor = open_executor()
    spec = executor.spec
    try:
        # the first makes what stays: workspaces, tables of penalties
        executor.collect(executor.launch(largest_decode(spec)))
        decode = _transient(executor, largest_decode(spec), allocator)
        plain = _transient(executor, largest_decode(spec, plain=True), allocator)
        prefill = _transient(executor, largest_prefill(spec), allocator)
    except RuntimeError as error:
        _refuse_if_full(error, spec, before)
        raise
    beside = allocator.allocated()
    executor.close()
    del executor
    gc.collect()
    allocator.restart()
    held = beside - allocator.allocated()  # but workspaces, which stay
    graphs = graph_reserve(graphed, spec.max_step_tokens, spec.dtype, plain) if graphed else 0
    peak = Peak(held, prefill, decode, graphs)
    logger.info(
        "steps take %s at most for prompts, %s for decodes, beside %s kept between them; "
        "measured in %.1f s",
        mib(peak.prefill),
        mib(peak.decode),
        mib(peak.held),
        time.monotonic() - started,
    )
    return peak


def _refuse_if_full(error: RuntimeError, spec: BackendSpec, weights: int) -> None:
    """Raise StartFailed for an error that tells of want of memory."""
    if any(words in str(error) for words in OUT_OF_MEMORY):
        raise StartFailed(
            f"a step of {spec.max_step_tokens:,} tokens and {spec.max_running} rows does not fit "
            f"beside the weights, {mib(weights)}: lower MAX_STEP_TOKENS or MAX_RUNNING"
        ) from None


def _transient(executor: StepExecutor, plan: StepPlan, allocator: Allocator) -> int:
    """What a step takes while it runs, over what it leaves."""
    allocator.restart()
    executor.collect(executor.launch(plan))
    return allocator.highest() - allocator.allocated()


def largest_decode(spec: BackendSpec, plain: bool = False) -> StepPlan:
    """Every row decodes. The first is at the end of the context, which the others need not be: a
    step is made for its longest row. `plain`: nothing but a token is asked for.
    """
    last = spec.max_model_len - 1
    starts = [last, *(0 for _ in range(1, spec.max_running))]
    chunks = [
        Chunk(
            slot=slot,
            start=start,
            count=1,
            tokens=None,
            pages=[0] * spec.pages_for(start + 1),
            first=True,
            samples=True,
            logprobs=not plain,
            top=0 if plain else MAX_TOP_LOGPROBS,
        )
        for slot, start in enumerate(starts)
    ]
    if plain:
        return StepPlan(chunks, [SlotSetup(chunk.slot, DRAWN, 0, (), 0) for chunk in chunks])
    return StepPlan(chunks, _setups(spec, len(chunks)))


def largest_prefill(spec: BackendSpec) -> StepPlan:
    """A step's whole budget of prompts, as long as the context allows and as many as there are
    rows. All draw. The first is the end of a context; two slices of its positions are scored, one
    after the other as more of them would be.
    """
    chunks: list[Chunk] = []
    tokens = min(spec.max_step_tokens, spec.max_running * spec.max_model_len)
    rows = min(spec.max_running, tokens)
    for slot in range(rows):
        count = min(spec.max_model_len, tokens - (rows - slot - 1))  # one each for the others
        tokens -= count
        start = 0 if slot else spec.max_model_len - count
        chunks.append(
            Chunk(
                slot=slot,
                start=start,
                count=count,
                tokens=[0] * count,
                pages=[0] * spec.pages_for(start + count),
                first=True,
                samples=True,
                logprobs=True,
                top=MAX_TOP_LOGPROBS,
                score_start=start,
                targets=[] if slot else [0] * min(count, 2 * SCORED_ROWS),
            )
        )
    return StepPlan(chunks, _setups(spec, rows))


def _setups(spec: BackendSpec, rows: int) -> list[SlotSetup]:
    """All ask for everything. The first has met as many ids as a step's prompt can hold."""
    met = min(spec.max_model_len, spec.max_step_tokens, spec.vocabulary)
    prompts = [tuple(range(met)), *((0,) for _ in range(1, rows))]
    return [SlotSetup(slot, DEMANDING, slot, (), 0, prompt) for slot, prompt in enumerate(prompts)]


def return_heap() -> None:
    """Give the holes that loading left in the heap back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
