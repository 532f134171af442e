"""Attention by FlashInfer (Ye et al. 2025), which reads the pages where they lie.

Every step is planned on the host, once for each way that its layers attend: 100 to 200 us, and no
CUDA graph can hold it. A step waits for the one before it. Kernels are compiled at their first use,
which takes up to a minute and the CUDA toolkit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from backend.hf.attention import AttentionOptions, AttentionSetup
from backend.hf.attention.choice import load_package
from backend.hf.attention.pools import kv_pools
from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan
from backend.interface import Unsupported

WORKSPACE = 128 << 20  # bytes for the parts of split sequences, what FlashInfer recommends


@dataclass(frozen=True, eq=False, slots=True)
class Paged:
    """Where some sequences lie, as FlashInfer reads it; on the host but for `pages`. All int32."""

    bounds: Tensor  # [sequences + 1]: where in `pages` each begins, and where the last ends
    pages: Tensor  # of all sequences, one after the other
    last: Tensor  # [sequences]: tokens in the last page


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """A step: the same for every layer."""

    batch: ForwardBatch
    decodes: Paged | None
    chunks: Paged | None
    bounds: Tensor  # [chunks + 1] int32 on the host: where in the chunks' rows each begins


@dataclass(eq=False, slots=True)
class Wrappers:
    """FlashInfer's kernels for layers that attend alike."""

    decode: Any
    prefill: Any
    step: Step | None = None  # that they are planned for


class FlashInferAttention:
    """Owns the KV pool: one tensor a layer, [pages * page_tokens, row], on a CUDA device."""

    def __init__(self, setup: AttentionSetup) -> None:
        self._geometry = setup.geometry
        self._page_tokens = setup.page_tokens
        self._dtype = setup.dtype
        self.pools = kv_pools(
            setup.geometry, setup.pages, setup.page_tokens, setup.dtype, setup.device
        )
        self._flashinfer = load_package("flashinfer")
        self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=setup.device)
        self._wrappers: dict[tuple[int, AttentionOptions], Wrappers] = {}
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
        step = self._step
        if step is None or step.batch is not batch:
            step = self._step = self._read(batch)
        wrappers = self._plan(step, query.shape[1], options)
        cache = self._views(self.pools[layer])
        query = query if query.stride(2) == 1 else query.contiguous()
        count = batch.decodes.count
        if step.decodes is not None:
            wrappers.decode.run(query[:count], cache, out=output[:count])
        if step.chunks is not None:
            wrappers.prefill.run(query[count:], cache, out=output[count:])

    def _views(self, pool: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [pages, page_tokens, kv_heads, width] each."""
        shape = (-1, self._page_tokens, 2, self._geometry.kv_heads, self._geometry.key_width)
        keys, values = pool.view(shape).unbind(2)
        return keys, values

    def _read(self, batch: ForwardBatch) -> Step:
        """Waits for the device: planning overwrites pinned memory that a copy of the step before
        may still be reading.
        """
        batch.positions[-1].item()
        rows, spans = batch.decodes, batch.spans
        return Step(
            batch,
            self._decodes(rows) if rows.count else None,
            self._chunks(spans) if spans else None,
            _bounds([span.count for span in spans]),
        )

    def _decodes(self, rows: DecodeRows) -> Paged:
        lengths = rows.lengths.tolist()
        held = -(-rows.lengths // self._page_tokens)
        pages = rows.pages
        columns = torch.arange(pages.shape[1], device=pages.device)
        return self._paged(lengths, pages[columns < held[:, None]])

    def _chunks(self, spans: Sequence[PrefillSpan]) -> Paged:
        lengths = [span.start + span.count for span in spans]
        return self._paged(lengths, torch.cat([span.pages for span in spans]))

    def _paged(self, lengths: list[int], pages: Tensor) -> Paged:
        size = self._page_tokens
        last = torch.tensor([(length - 1) % size + 1 for length in lengths], dtype=torch.int32)
        return Paged(_bounds([-(-length // size) for length in lengths]), pages.int(), last)

    def _plan(self, step: Step, heads: int, options: AttentionOptions) -> Wrappers:
        """The kernels for layers of these options, planned for this step."""
        if options.sinks is not None:
            raise Unsupported("ATTN_IMPL=flashinfer has no attention sinks: use ATTN_IMPL=triton")
        if (heads, options) not in self._wrappers:
            self._wrappers[heads, options] = Wrappers(
                self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "NHD", use_tensor_cores=True
                ),
                self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD"),
            )
        wrappers = self._wrappers[heads, options]
        if wrappers.step is not step:
            self._plan_for(wrappers, step, heads, options)
            wrappers.step = step
        return wrappers

    def _plan_for(
        self, wrappers: Wrappers, step: Step, heads: int, options: AttentionOptions
    ) -> None:
        geometry, decodes, chunks = self._geometry, step.decodes, step.chunks
        shape = (heads, geometry.kv_heads, geometry.key_width, self._page_tokens)
        same: dict[str, Any] = {
            "sm_scale": options.scale,
            "window_left": -1 if options.window is None else options.window - 1,
            "logits_soft_cap": options.softcap,
            "q_data_type": self._dtype,
            "kv_data_type": self._dtype,
        }
        if decodes is not None:
            places = (decodes.bounds, decodes.pages, decodes.last)
            wrappers.decode.plan(*places, *shape, **same)
        if chunks is not None:
            places = (chunks.bounds, chunks.pages, chunks.last)
            wrappers.prefill.plan(step.bounds, *places, *shape, causal=True, **same)


def _bounds(counts: list[int]) -> Tensor:
    """Where each of some consecutive pieces begins, and where the last ends: int32, on the host."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
