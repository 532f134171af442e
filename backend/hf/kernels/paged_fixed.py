"""Attention over pages in an order that depends on nothing but a query's position.

A row's bits are the same in any batch and chunk, as a decode or in a prompt, since tiles have one
shape, keys are read from pages in blocks and splits at absolute positions, the parts of splits
are joined one by one in order, and a block or split that a row sees nothing of leaves its bits as
they are. One compiled kernel serves decodes and chunks, so nothing of a launch may be specialized.
Floors are those of `paged_decode.py` and `paged_prefill.py`; looking up a chunk's own keys in pages
and masking each block cost some of them. Reference:
`tests/backend/hf/kernels/test_paged_attention.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from backend.hf.kernels.paged_attention import (
    NOTHING,
    arrive,
    finish,
    over_pages,
    query_tile,
    store_rows,
)

SPLIT = 1024  # positions; a multiple of every tiling's keys
POSITIONS = tl.constexpr(SPLIT)


@triton.jit
def _join(mixed, peak, total, more, more_peak, more_total):
    """Two parts of one softmax, the first of which may be empty; elementwise, as `finish` is.

    An empty second part leaves the bits of the first.
    """
    higher = tl.maximum(peak, more_peak)
    fade, weight = tl.exp2(peak - higher), tl.exp2(more_peak - higher)
    mixed = tl.fma(more, weight, mixed * fade)
    return mixed, higher, tl.fma(more_total, weight, total * fade)


@triton.jit
def _tile(tiles, number):
    """First token, queries, position of the first and first of `pages`, of one tile."""
    tile = tiles + number * 4
    count, start = tl.load(tile + 1).to(tl.int32), tl.load(tile + 2).to(tl.int32)
    return tl.load(tile), count, start, tl.load(tile + 3)


@triton.jit
def _over_splits(
    q, at, low, high, floor, end, pool, pages, kv_head, inner, outer,
    KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The softmax of the splits `low` .. `high` - 1, of their positions from `floor` on below
    `end`; peak and total are [ROWS, 1].
    """
    mixed = tl.zeros([q.shape[0], VALUE_BLOCK], tl.float32)
    peak = tl.full([q.shape[0], 1], NOTHING, tl.float32)
    total = tl.zeros([q.shape[0], 1], tl.float32)
    for split in range(low, high):
        more, more_peak, more_total = over_pages(
            q, at, tl.maximum(split * POSITIONS, floor), tl.minimum((split + 1) * POSITIONS, end),
            pool, pages, kv_head, inner, outer,
            KV_HEADS, KEY, VALUE, PAGE, True, WINDOW, CAPPED, BLOCK, KEY_BLOCK, VALUE_BLOCK,
        )  # fmt: skip
        mixed, peak, total = _join(
            mixed, peak, total, more, more_peak[:, None], more_total[:, None]
        )
    return mixed, peak, total


@triton.jit
def _join_all(
    parts, peaks, totals, sinks, output, first, last, kv_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Write the output of one query, whose parts lie in the cells `first` .. `last` - 1."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(GROUP * VALUE)
    c = tl.arange(0, COLUMNS)
    real = c < GROUP * VALUE
    head = kv_head * GROUP + c // VALUE
    column = kv_head * (GROUP * VALUE) + c
    mixed = tl.zeros([COLUMNS], tl.float32)
    peak = tl.full([COLUMNS], NOTHING, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for cell in range(first, last):
        at = cell * (KV_HEADS * GROUP)
        more = tl.load(parts + at * VALUE + column, mask=real, other=0.0)
        more_peak = tl.load(peaks + at + head, mask=real, other=NOTHING)
        more_total = tl.load(totals + at + head, mask=real, other=0.0)
        mixed, peak, total = _join(mixed, peak, total, more, more_peak, more_total)
    mean = finish(mixed, peak, total, sinks, head, real)
    tl.store(output + column, mean.to(output.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["own", "splits", "query_stride", "head_stride"])
def fixed_kernel(
    query,  # [tokens, heads, KEY]
    pool,  # [positions, KV_HEADS * (KEY + VALUE)]
    pages,  # of all tiles
    tiles,  # [tiles, 4] int64: first token, queries, position of the first, first of `pages`
    counters,  # [tiles, KV_HEADS] int32, zeros
    sinks,  # [heads] or None
    output,  # [tokens, heads, VALUE]
    parts,  # [tiles, splits, heads, VALUE] float32, where a program has one split:
    peaks, totals,  # the like without VALUE; tiles are of one query then
    own,  # splits of a program
    splits, query_stride, head_stride, inner, outer,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries of a tile over `own` splits, 1 or all. Grid [KV_HEADS, splits / own, tiles]."""
    kv_head, program, number = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, count, start, page = _tile(tiles, number)
    floor = tl.maximum(start - WINDOW + 1, 0) // BLOCK * BLOCK if WINDOW else 0
    earliest, end = floor // POSITIONS, tl.cdiv(start + count, POSITIONS)
    low = tl.maximum(program * own, earliest)
    high = tl.minimum(program * own + own, end)
    if low >= high:
        return
    r = tl.arange(0, ROWS)
    real = (r // GROUP < count) & (r < ROWS // GROUP * GROUP)
    head = kv_head * GROUP + r % GROUP
    token = first + r // GROUP
    q = query_tile(query, token * query_stride + head * head_stride, real, KEY, KEY_BLOCK)
    mixed, peak, total = _over_splits(
        q, start + r // GROUP, low, high, floor, start + count, pool, pages + page, kv_head,
        inner, outer, KV_HEADS, KEY, VALUE, PAGE, WINDOW, CAPPED, BLOCK, KEY_BLOCK, VALUE_BLOCK,
    )  # fmt: skip
    if high - low == end - earliest:
        mean = finish(mixed, peak, total, sinks, head[:, None], real[:, None])
        store_rows(output, token * (KV_HEADS * GROUP) + head, real, mean, VALUE)
    else:
        cell = number * splits
        part = (cell + program) * (KV_HEADS * GROUP) + head
        store_rows(parts, part, real, mixed, VALUE)
        tl.store(peaks + part[:, None], peak, mask=real[:, None])
        tl.store(totals + part[:, None], total, mask=real[:, None])
        if arrive(counters + number * KV_HEADS + kv_head, end - earliest):
            _join_all(
                parts, peaks, totals, sinks, output + first * (KV_HEADS * GROUP * VALUE),
                cell + earliest, cell + end, kv_head, GROUP, KV_HEADS, VALUE,
            )  # fmt: skip
