"""Attention by the FlashAttention-3 (Shah et al. 2024) that SGLang is built on, which reads the
pages where they lie. It comes with the package sglang-kernel, and needs nothing else of SGLang.

A step is one launch a layer for its decodes and one for its chunks. How decodes are dealt out over
the chip is settled on the device, once a step, from the lengths that stand there: a CUDA graph may
hold it and serves every length up to the one it was captured for.

Pages that are whole tiles of the kernel (some 80 tokens or more, by width) are copied whole, so
what stands behind a sequence in its last page must be finite, as what `kv_pools` makes is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from backend.hf.attention import AttentionOptions, AttentionSetup
from backend.hf.attention.choice import load_package, package_of
from backend.hf.attention.pools import kv_pools
from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan
from backend.hf.transfer import to_device

# Queries whose keys may be read in splits. More of them fill the chip without, and the splits'
# results, float32 for each query and split, would come to gigabytes.
SPLIT_TOKENS = 512
AS_IT_PAYS, WHOLE = 0, 1  # splits of a sequence, in the package's terms
EVERYTHING = (-1, -1)  # a window without ends


@dataclass(frozen=True, eq=False, slots=True)
class Paged:
    """Queries of some sequences, and where their keys lie. All int32, on the device."""

    bounds: Tensor  # [sequences + 1]: where in the queries each begins, and where the last ends
    lengths: Tensor  # [sequences]: positions attended to; the last query stands on the last of them
    table: Tensor  # [sequences, pages]: page ids; those past a length are valid ones
    tokens: int  # queries in all
    longest: int  # queries of one sequence
    # for decodes: the package's schedules, by query heads and whether there is a softcap
    schedules: dict[tuple[int, bool], Tensor] = field(default_factory=dict)

    @property
    def splits(self) -> int:
        return AS_IT_PAYS if self.tokens <= SPLIT_TOKENS else WHOLE


@dataclass(eq=False, slots=True)
class Step:
    """A step: the same for every layer."""

    batch: ForwardBatch
    decodes: Paged | None
    chunks: Paged | None
    layer: int  # the last that attended


class SglKernelAttention:
    """Owns the KV pool: one tensor a layer, [pages * page_tokens, row], on a CUDA device."""

    def __init__(self, setup: AttentionSetup) -> None:
        self._geometry = setup.geometry
        self._page_tokens = setup.page_tokens
        self._dtype = setup.dtype
        self.pools = kv_pools(
            setup.geometry, setup.pages, setup.page_tokens, setup.dtype, setup.device
        )
        package = load_package(package_of("sgl_kernel", setup.dtype, setup.geometry))
        self._kernel: Any = package.flash_attn_with_kvcache
        self._schedule: Any = package.get_scheduler_metadata
        self._step: Step | None = None

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
        step = self._enter(layer, batch)
        count = batch.decodes.count
        if step.decodes is not None:
            schedule = self._schedule_of(step.decodes, query.shape[1], options)
            self._run(layer, query[:count], step.decodes, options, output[:count], schedule)
        if step.chunks is not None:
            self._run(layer, query[count:], step.chunks, options, output[count:], None)

    def _enter(self, layer: int, batch: ForwardBatch) -> Step:
        """The step that `layer` belongs to. Layers come in rising order, so one that does not is
        the first of another step: a graph must hold what is read here, even when its batch ran
        before it was captured.
        """
        step = self._step
        if step is None or step.batch is not batch or layer <= step.layer:
            rows, spans = batch.decodes, batch.spans
            decodes = _decodes(rows) if rows.count else None
            step = self._step = Step(batch, decodes, _chunks(spans) if spans else None, layer)
        step.layer = layer
        return step

    def _run(
        self,
        layer: int,
        query: Tensor,
        paged: Paged,
        options: AttentionOptions,
        output: Tensor,
        schedule: Tensor | None,
    ) -> None:
        """Attend for query [tokens, heads, width] into output [tokens, heads, width]."""
        keys, values = self._views(self.pools[layer])
        sinks, window = options.sinks, options.window
        self._kernel(
            query,
            keys,
            values,
            cache_seqlens=paged.lengths,
            page_table=paged.table,
            cu_seqlens_q=paged.bounds,
            max_seqlen_q=paged.longest,
            softmax_scale=options.scale,
            causal=True,
            window_size=EVERYTHING if window is None else (window - 1, 0),
            softcap=options.softcap or 0.0,
            scheduler_metadata=schedule,
            num_splits=paged.splits,
            sinks=None if sinks is None else sinks.to(torch.bfloat16),  # it takes no other
            out=output,
        )

    def _views(self, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [pages, page_tokens, kv_heads, width] each."""
        shape = (-1, self._page_tokens, 2, self._geometry.kv_heads, self._geometry.key_width)
        keys, values = pool.view(shape).unbind(2)
        return keys, values

    def _schedule_of(self, paged: Paged, heads: int, options: AttentionOptions) -> Tensor | None:
        """The package's schedule for decodes. None: a layer with a window has one of its own, which
        the kernel makes.

        It is for the shapes, splits and longest context that the kernel reads from its arguments:
        if any differed, the kernel would write behind its splits' results.
        """
        if options.window is not None:
            return None
        key = heads, options.softcap is not None
        if key not in paged.schedules:
            sequences, pages = paged.table.shape
            paged.schedules[key] = self._schedule(
                batch_size=sequences,
                max_seqlen_q=paged.longest,
                max_seqlen_k=pages * self._page_tokens,
                num_heads=heads,
                num_heads_k=self._geometry.kv_heads,
                headdim=self._geometry.key_width,
                cache_seqlens=paged.lengths,
                qkv_dtype=self._dtype,
                cu_seqlens_q=paged.bounds,
                page_size=self._page_tokens,
                causal=True,
                has_softcap=options.softcap is not None,
                num_splits=paged.splits,
            )
        return paged.schedules[key]


def _decodes(rows: DecodeRows) -> Paged:
    """Device work alone, of shapes that a graph fixes."""
    bounds = torch.arange(rows.count + 1, dtype=torch.int32, device=rows.lengths.device)
    return Paged(bounds, rows.lengths.int(), rows.pages.int(), rows.count, longest=1)


def _chunks(spans: Sequence[PrefillSpan]) -> Paged:
    """Their pages one after the other, then a row of them for each: it runs on into those of the
    next chunk, or stays on the very last.
    """
    counts = [span.count for span in spans]
    held = [len(span.pages) for span in spans]
    pages = torch.cat([span.pages for span in spans])
    device = pages.device
    first = to_device([0, *accumulate(held)][:-1], device)
    places = first[:, None] + torch.arange(max(held), device=device)
    return Paged(
        bounds=to_device([0, *accumulate(counts)], device, torch.int32),
        lengths=to_device([span.start + span.count for span in spans], device, torch.int32),
        table=pages[places.clamp_(max=len(pages) - 1)].int(),
        tokens=sum(counts),
        longest=max(counts),
    )
