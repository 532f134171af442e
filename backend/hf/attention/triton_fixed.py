"""How DETERMINISTIC attends: decodes and chunks by one compiled kernel in one tiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backend.hf.attention.triton_launch import Kernels, LayerCall, StepCache, Tiling, padded
from backend.hf.attention.triton_prefill import query_tiles
from backend.hf.batch import DecodeRows, PrefillSpan
from backend.hf.kernels.paged_fixed import SPLIT, fixed_kernel
from backend.hf.transfer import to_device

WHOLE = 1 << 30  # splits of a program that has all of them


@dataclass(frozen=True, eq=False, slots=True)
class FixedTiles:
    """The tiles of a step's decodes or chunks, and room for the parts of split decodes."""

    splits: int  # of a tile, at most
    own: int  # of a program
    pages: Tensor  # int64
    tiles: Tensor  # [tiles, 4] int64: what the kernel says
    counters: Tensor  # int32
    parts: Tensor  # float32, and so are
    peaks: Tensor
    totals: Tensor


class FixedAttention:
    """Attends so that a row's bits depend on nothing but its sequence."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._tiling = fixed_tiling(kernels)
        self._decodes: StepCache[FixedTiles] = StepCache()
        self._chunks: StepCache[FixedTiles] = StepCache()

    def decode(self, call: LayerCall, rows: DecodeRows) -> None:
        """Into the first rows of the output; a program has one split, as the table bounds them."""
        self._launch(
            call,
            self._decodes.get(rows, call.heads, call.layer, lambda: self._rows(rows, call.heads)),
        )

    def prefill(self, call: LayerCall, spans: Sequence[PrefillSpan]) -> None:
        """Into the chunks' rows of the output; a program has all splits of its tile."""
        self._launch(
            call,
            self._chunks.get(spans, call.heads, call.layer, lambda: self._tiles(spans, call.heads)),
        )

    def _launch(self, call: LayerCall, cut: FixedTiles) -> None:
        kernels, tiling, kv_heads = self._kernels, self._tiling, self._kernels.geometry.kv_heads
        fixed_kernel[kv_heads, -(-cut.splits // cut.own), len(cut.tiles)](
            call.query, call.pool, cut.pages, cut.tiles, cut.counters, call.options.sinks,
            call.output, cut.parts, cut.peaks, cut.totals, cut.own, cut.splits,
            call.query.stride(0), call.query.stride(1), *call.scaling, *kernels.constants(call),
            kernels.page_tokens, call.options.window or 0, call.options.softcap is not None,
            self._height(call.heads), tiling.keys, *kernels.widths, **tiling.options,
        )  # fmt: skip

    def _height(self, heads: int) -> int:
        """Rows of a tile."""
        return max(self._tiling.rows, padded(heads // self._kernels.geometry.kv_heads))

    def _rows(self, rows: DecodeRows, heads: int) -> FixedTiles:
        """A tile for each decode."""
        kernels, table, ends = self._kernels, rows.table, rows.lengths
        number = torch.arange(rows.count, device=table.device)
        fields = number, torch.ones_like(number), ends - 1, rows.slots * table.stride(0)
        splits = -(-table.shape[1] * kernels.page_tokens // SPLIT)
        cells = rows.count * splits if splits > 1 else 1
        width, kv_heads = kernels.geometry.value_width, kernels.geometry.kv_heads
        return FixedTiles(
            splits,
            1,
            table,
            torch.stack(fields, 1),
            torch.zeros(rows.count, kv_heads, dtype=torch.int32, device=table.device),
            torch.empty(cells, heads, width, dtype=torch.float32, device=table.device),
            *torch.empty(2, cells, heads, dtype=torch.float32, device=table.device),
        )

    def _tiles(self, spans: Sequence[PrefillSpan], heads: int) -> FixedTiles:
        """The chunks, cut."""
        queries = self._height(heads) // (heads // self._kernels.geometry.kv_heads)
        pages = torch.cat([span.pages for span in spans])
        cut = query_tiles(spans, queries, [len(span.pages) for span in spans])
        offset, count, start, before, first = cut.T
        tiles = [offset + first, np.minimum(count - first, queries), start + first, before]
        none = torch.empty(0, dtype=torch.float32, device=pages.device)
        return FixedTiles(
            1,
            WHOLE,
            pages,
            to_device(np.column_stack(tiles), pages.device),
            torch.empty(0, dtype=torch.int32, device=pages.device),
            none,
            none,
            none,
        )


def fixed_tiling(kernels: Kernels) -> Tiling:
    """The one for everything. Its keys divide SPLIT."""
    if kernels.dtype == torch.float32:  # no tensor cores: tiles live in registers
        return Tiling(32, 32, warps=4, stages=1)
    wide = kernels.widths[1] > 128  # two sums of values are held
    return Tiling(64, kernels.keys(64, 3, 64), warps=8 if wide else 4, stages=3)
