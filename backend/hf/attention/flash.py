"""Attention by FlashAttention (Dao et al.; Shah et al. 2024 for Hopper) where a prompt begins, and
by our Triton kernels everywhere else.

Prompts without a cached prefix attend to their own keys and values, which are still at hand in one
piece: no release of the package needs more, and none of them is as fast over pages. Decodes, chunks
behind a prefix, and layers with a window, a softcap or sinks go to Triton.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from backend.hf.attention import AttentionOptions, AttentionSetup
from backend.hf.attention.choice import load_package, package_of
from backend.hf.attention.triton import TritonAttention
from backend.hf.batch import ForwardBatch, PrefillSpan
from backend.hf.transfer import to_device

logger = logging.getLogger(__name__)

KERNEL = "flash_attn_varlen_func"  # so called in every release, with the keywords used here


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """Prompts that begin in this step, next to each other in the batch."""

    rows: slice  # of the batch
    bounds: Tensor  # [prompts + 1] int32: where in the run each begins, and where the last ends
    longest: int  # tokens of one prompt


@dataclass(frozen=True, eq=False, slots=True)
class Parts:
    """A step by who attends for it: the same for every layer."""

    batch: ForwardBatch
    runs: tuple[Run, ...]
    rest: ForwardBatch | None  # what Triton has to do; None: nothing


class FlashAttention:
    """Shares the pools of a `TritonAttention`, which it owns."""

    def __init__(self, setup: AttentionSetup) -> None:
        self._geometry = setup.geometry
        self._paged = TritonAttention(setup)
        package = package_of("flash", setup.dtype, setup.geometry)
        self._kernel: Any = getattr(load_package(package), KERNEL)
        self._parts: Parts | None = None
        logger.info("prompts attend by %s", package)

    @property
    def pools(self) -> Sequence[Tensor]:
        return self._paged.pools

    def attend(
        self,
        layer: int,
        query: Tensor,
        kv: Tensor,
        batch: ForwardBatch,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        """See `PagedAttention.attend`."""
        parts = self._parts
        if parts is None or parts.batch is not batch:
            parts = self._parts = part(batch)
        plain = options.window is None and options.softcap is None and options.sinks is None
        if not (parts.runs and plain):
            self._paged.attend(layer, query, kv, batch, options, output)
            return
        if parts.rest is not None:
            self._paged.attend(layer, query, kv, parts.rest, options, output)
        for run in parts.runs:
            output[run.rows] = self._begin(query[run.rows], kv[run.rows], run, options.scale)

    def _begin(self, query: Tensor, kv: Tensor, run: Run, scale: float) -> Tensor:
        """Attend for a run: query [tokens, heads, width], kv [tokens, row] -> [tokens, heads,
        width].
        """
        keys, values = kv.unflatten(1, (2, self._geometry.kv_heads, -1)).unbind(1)
        found: Tensor | tuple[Tensor, ...] = self._kernel(
            query,
            keys,
            values,
            cu_seqlens_q=run.bounds,
            cu_seqlens_k=run.bounds,
            max_seqlen_q=run.longest,
            max_seqlen_k=run.longest,
            softmax_scale=scale,
            causal=True,
        )
        return found[0] if isinstance(found, tuple) else found  # some give sums of the softmax too


def part(batch: ForwardBatch) -> Parts:
    """Who attends for what."""
    runs = tuple(
        _run(list(spans), batch.positions.device)
        for start, spans in groupby(batch.spans, lambda span: span.start)
        if start == 0
    )
    cached = tuple(span for span in batch.spans if span.start)
    nothing = not cached and not batch.decodes.count
    return Parts(batch, runs, None if nothing else replace(batch, spans=cached))


def _run(spans: list[PrefillSpan], device: torch.device) -> Run:
    counts = [span.count for span in spans]
    first = spans[0].offset
    bounds = to_device([0, *accumulate(counts)], device, torch.int32)
    return Run(slice(first, first + sum(counts)), bounds, max(counts))
