"""Attention by our Triton kernels, which read the pages where they lie: the CUDA path.

A step is two launches a layer, or three where long decodes are split; nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from backend.hf.attention import AttentionOptions, AttentionSetup
from backend.hf.attention.pools import kv_pools
from backend.hf.batch import ForwardBatch, PrefillSpan
from backend.hf.kernels.paged_attention import decode_kernel, prefill_kernel, reduce_kernel

DECODE_PROGRAMS = 4  # a multiprocessor: decodes are split until there are so many
WIDE_PROGRAMS = 2  # a multiprocessor: chunks that make fewer wide tiles are cut into narrow ones
SPLIT_TOKENS = 128  # of the longest row, in a split at least
MOST_SPLITS = 64
SMALLEST_DOT = 16  # sides of a tile that tensor cores multiply


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel cuts its work: query rows and keys of a tile, warps, stages of loads ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, eq=False, slots=True)
class PrefillTiles:
    """The chunks of a step, cut for `prefill_kernel`: the same for every layer."""

    batch: ForwardBatch
    heads: int
    tiling: Tiling
    tiles: Tensor  # [tiles, 5] int32: what the kernel says
    pages: Tensor  # of all chunks, one after the other


class TritonAttention:
    """Owns the KV pool: one tensor a layer, [pages * page_tokens, row], on a CUDA device."""

    def __init__(self, setup: AttentionSetup) -> None:
        geometry, dtype, device = setup.geometry, setup.dtype, setup.device
        self._geometry = geometry
        self._page_tokens = setup.page_tokens
        self.pools = kv_pools(geometry, setup.pages, setup.page_tokens, dtype, device)
        self._widths = _padded(geometry.key_width), _padded(geometry.value_width)
        chip = driver.active.utils.get_device_properties(torch.device(device).index or 0)
        self._processors = chip["multiprocessor_count"]
        room = chip["max_shared_mem"]
        self._whole, self._split = decode_tilings(sum(self._widths), dtype, room)
        self._wide, self._narrow = prefill_tilings(sum(self._widths), dtype, room)
        self._cut: PrefillTiles | None = None

    def attend(
        self, layer: int, query: Tensor, kv: Tensor, batch: ForwardBatch, options: AttentionOptions
    ) -> Tensor:
        """See `PagedAttention.attend`."""
        pool = self.pools[layer]
        if query.stride(2) != 1:
            query = query.contiguous()
        output = query.new_empty(*query.shape[:2], self._geometry.value_width)
        if batch.decodes.count:
            self._decode(query, pool, batch, options, output)
        if batch.spans:
            self._prefill(query, pool, batch, options, output)
        return output

    def _decode(
        self,
        query: Tensor,
        pool: Tensor,
        batch: ForwardBatch,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        """Attend for the decodes of `batch` into the first rows of `output`."""
        rows, heads = batch.decodes, query.shape[1]
        kv_heads, width = self._geometry.kv_heads, self._geometry.value_width
        bound = rows.pages.shape[1] * self._page_tokens
        seen = min(bound, options.window or bound)
        splits = split_count(rows.count * kv_heads, seen, DECODE_PROGRAMS * self._processors)
        tiling, target, peaks, totals = self._whole, output, None, None
        if splits > 1:
            tiling = self._split
            target = output.new_empty(rows.count, heads, splits, width, dtype=torch.float32)
            peaks, totals = target.new_empty(2, rows.count, heads, splits)
        group = heads // kv_heads
        decode_kernel[kv_heads, splits, rows.count](
            query, pool, rows.pages, rows.lengths, options.sinks, target, peaks, totals,
            query.stride(0), query.stride(1), rows.pages.stride(0), splits, *_scaling(options),
            group, *self._constants(options), max(tiling.rows, _padded(group)), tiling.keys,
            *self._widths, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        if splits > 1:
            reduce_kernel[(rows.count * heads,)](
                target, peaks, totals, output, splits, width, self._widths[1], splits
            )

    def _prefill(
        self,
        query: Tensor,
        pool: Tensor,
        batch: ForwardBatch,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        """Attend for the chunks of `batch` into their rows of `output`."""
        cut = self._cut
        if cut is None or cut.batch is not batch or cut.heads != query.shape[1]:
            cut = self._cut = self._cut_spans(batch, query.shape[1])
        kv_heads, tiling = self._geometry.kv_heads, cut.tiling
        prefill_kernel[kv_heads, len(cut.tiles)](
            query, pool, cut.pages, cut.tiles, options.sinks, output,
            query.stride(0), query.stride(1), *_scaling(options),
            query.shape[1] // kv_heads, *self._constants(options), tiling.rows, tiling.keys,
            *self._widths, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip

    def _cut_spans(self, batch: ForwardBatch, heads: int) -> PrefillTiles:
        """Wide tiles where there are enough of them for every multiprocessor, else narrow ones."""
        kv_heads = self._geometry.kv_heads
        rows = sum(span.count for span in batch.spans) * heads
        enough = rows >= WIDE_PROGRAMS * self._processors * self._wide.rows
        tiling = self._wide if enough else self._narrow
        group = heads // kv_heads
        tiling = replace(tiling, rows=max(tiling.rows, _padded(group)))
        tiles = query_tiles(batch.spans, tiling.rows // group)
        return PrefillTiles(
            batch,
            heads,
            tiling,
            torch.tensor(tiles, dtype=torch.int32, device=batch.positions.device),
            torch.cat([span.pages for span in batch.spans]),
        )

    def _constants(self, options: AttentionOptions) -> tuple[Any, ...]:
        """KV_HEADS, KEY, VALUE, PAGE, WINDOW and CAPPED of the kernels."""
        geometry = self._geometry
        return (
            geometry.kv_heads,
            geometry.key_width,
            geometry.value_width,
            self._page_tokens,
            options.window or 0,
            options.softcap is not None,
        )


def split_count(programs: int, tokens: int, wanted: int) -> int:
    """Into how many parts each decode is cut: a power of two.

    `programs` run with one part each, `wanted` fill the chip; `tokens` is the longest row's length
    at most.
    """
    most = min(-(-wanted // programs), -(-tokens // SPLIT_TOKENS), MOST_SPLITS)
    return 1 << (most.bit_length() - 1) if most > 1 else 1


def query_tiles(spans: Sequence[PrefillSpan], queries: int) -> list[tuple[int, ...]]:
    """`prefill_kernel`'s tiles of `queries` each, those with the most keys first: the last to end
    are then short.
    """
    tiles, pages = [], 0
    for span in spans:
        firsts = range(0, span.count, queries)
        tiles += [(span.offset, span.count, span.start, pages, first) for first in firsts]
        pages += len(span.pages)
    return sorted(tiles, key=lambda tile: tile[2] + tile[4], reverse=True)


def decode_tilings(width: int, dtype: torch.dtype, room: int) -> tuple[Tiling, Tiling]:
    """For whole rows, and for split ones, which gain more from a second program beside the first.

    `width`: elements of a key and a value together; `room`: bytes of shared memory that a program
    can have.
    """
    if dtype == torch.float32:  # no tensor cores: tiles live in registers
        return (Tiling(SMALLEST_DOT, 32, warps=4, stages=1),) * 2
    return (
        Tiling(SMALLEST_DOT, _keys(128, width, dtype, room, 3), warps=4, stages=3),
        Tiling(SMALLEST_DOT, _keys(64, width, dtype, room, 3), warps=2, stages=3),
    )


def prefill_tilings(width: int, dtype: torch.dtype, room: int) -> tuple[Tiling, Tiling]:
    """A wide and a narrow one; see `decode_tilings`. Queries take shared memory too."""
    if dtype == torch.float32:
        return (Tiling(32, 32, warps=4, stages=1),) * 2
    row = width * dtype.itemsize // 2
    return (
        Tiling(128, _keys(32, width, dtype, room - 128 * row, 3), warps=8, stages=3),
        Tiling(64, _keys(64, width, dtype, room - 64 * row, 3), warps=4, stages=3),
    )


def _keys(most: int, width: int, dtype: torch.dtype, room: int, stages: int) -> int:
    """Keys of a tile, so that `stages` of them and their values fit into `room` bytes."""
    while most > SMALLEST_DOT and most * width * dtype.itemsize * stages > room:
        most //= 2
    return most


def _scaling(options: AttentionOptions) -> tuple[float, float]:
    """`inner` and `outer` of the kernels."""
    if options.softcap is None:
        return options.scale / log(2), 1.0
    return options.scale / options.softcap, options.softcap / log(2)


def _padded(size: int) -> int:
    """The power of two that holds `size`, no less than a tile's side."""
    return max(SMALLEST_DOT, 1 << (size - 1).bit_length())
