"""How prompt chunks are launched: cut into tiles on the host once a step, one kernel a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from backend.hf.attention.triton_launch import Kernels, LayerCall, StepCache, Tiling, padded
from backend.hf.batch import PrefillSpan
from backend.hf.kernels.paged_prefill import prefill_kernel
from backend.hf.transfer import to_device

WIDE_PROGRAMS = 8  # a multiprocessor: chunks that make fewer wide tiles are cut into narrow ones


@dataclass(frozen=True, slots=True)
class HeadTiling(Tiling):
    """A tile of all query heads of a KV head, or of one of them."""

    grouped: bool = True


@dataclass(frozen=True, eq=False, slots=True)
class PrefillTiles:
    """The chunks of a step, cut for `prefill_kernel`."""

    tiling: HeadTiling
    heads: int  # of a tile
    tiles: Tensor  # [tiles, 5] int32: what the kernel says
    pages: Tensor  # before each chunk, one chunk after the other


class PrefillAttention:
    """Attends for prompt chunks, into their rows of the output."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._wide, self._narrow = prefill_tilings(kernels)
        self._cuts: StepCache[PrefillTiles] = StepCache()

    def __call__(self, call: LayerCall, spans: Sequence[PrefillSpan]) -> None:
        kernels = self._kernels
        cut = self._cuts.get(
            spans, call.heads, call.layer, lambda: self._cut(spans, call.heads, call.kv.device)
        )
        tiling, tma = cut.tiling, self._fits_tma(call.kv)
        own: Any = call.kv
        if tma:
            box = [tiling.keys, kernels.geometry.key_width]
            own = TensorDescriptor(own, list(own.shape), list(own.stride()), box)
        prefill_kernel[call.heads // cut.heads, len(cut.tiles)](
            call.query, own, call.kv.stride(0), call.pool, cut.pages, cut.tiles,
            call.options.sinks, call.output, call.query.stride(0), call.query.stride(1),
            *call.scaling, *kernels.constants(call), kernels.page_tokens, call.options.window or 0,
            call.options.softcap is not None, cut.heads, tiling.rows, tiling.keys,
            *kernels.widths, tma, **tiling.options,
        )  # fmt: skip

    def _fits_tma(self, kv: Tensor) -> bool:
        """Whether tiles of `kv` can be copied by the chip's tensor memory accelerator."""
        geometry = self._kernels.geometry
        whole = (geometry.key_width, geometry.value_width) == self._kernels.widths
        alike = geometry.key_width == geometry.value_width and kv.element_size() == 2
        aligned = kv.data_ptr() % 16 == 0 and kv.stride(0) * kv.element_size() % 16 == 0
        return self._kernels.hopper and whole and alike and aligned

    def _cut(self, spans: Sequence[PrefillSpan], heads: int, device: torch.device) -> PrefillTiles:
        """Wide tiles where there are enough of them for every multiprocessor, else narrow ones."""
        kernels = self._kernels
        rows = sum(span.count for span in spans) * heads
        enough = rows >= WIDE_PROGRAMS * kernels.processors * self._wide.rows
        tiling = self._wide if enough else self._narrow
        together = heads // kernels.geometry.kv_heads if tiling.grouped else 1
        tiling = replace(tiling, rows=max(tiling.rows, padded(together)))
        held = [-(-span.start // kernels.page_tokens) for span in spans]
        before = [span.pages[:count] for span, count in zip(spans, held, strict=True) if count]
        tiles = query_tiles(spans, tiling.rows // together, held)
        return PrefillTiles(
            tiling,
            together,
            to_device(tiles, device, torch.int32),
            torch.cat(before) if before else spans[0].pages,  # of which nothing is read then
        )


def query_tiles(
    spans: Sequence[PrefillSpan], queries: int, pages: Sequence[int]
) -> np.ndarray[Any, Any]:
    """`prefill_kernel`'s tiles of `queries` each, those with the most keys first: the last to end
    are then short. `pages` are counted for each span. [tiles, 5].
    """
    chunks = np.array([(span.offset, span.count, span.start) for span in spans])
    counts = -(-chunks[:, 1] // queries)
    ends = counts.cumsum()
    before = np.cumsum(pages) - pages
    first = (np.arange(ends[-1]) - np.repeat(ends - counts, counts)) * queries
    whole = np.column_stack([chunks, before]).repeat(counts, axis=0)
    tiles = np.column_stack([whole, first])
    return tiles[np.argsort(-(tiles[:, 2] + first), kind="stable")]


def prefill_tilings(kernels: Kernels) -> tuple[HeadTiling, HeadTiling]:
    """A wide and a narrow one."""
    if kernels.dtype == torch.float32:  # no tensor cores: tiles live in registers
        return (HeadTiling(32, 32, warps=4, stages=1),) * 2
    wide = HeadTiling(128, kernels.keys(64, 2, 128), warps=8, stages=2)
    if kernels.hopper and sum(kernels.widths) <= 256:
        wide = replace(wide, registers=128)  # two programs beside each other
    return wide, HeadTiling(64, kernels.keys(64, 3, 64), warps=4, stages=3)
