"""Prefill attention: queries of prompt chunks over the pages before a chunk and its own keys.

Bound by its products: 4 * heads * width operations for each pair of query and key that sees it; a
chunk of 4,096 at 16 heads of 128 is 69 GFLOP, 0.09 ms of an H200's matrix product rate. A chunk's
own keys and values are rows of the model's product, so they come as whole tiles, by TMA where the
chip and the widths have it; only keys before the chunk are looked up in pages.
Reference: `tests/backend/hf/kernels/test_paged_attention.py`. Tiles: Dao et al. 2022.
"""

from __future__ import annotations

import triton
import triton.language as tl

from backend.hf.kernels.paged_attention import finish, fold, over_pages, query_tile, store_rows


@triton.jit
def _own_tile(
    own,  # [tokens, row of keys, then values]: a descriptor of BLOCK rows of a head; or a pointer
    own_stride,
    token,  # the tile's first
    end,  # of the chunk's tokens: what lies key_number it is another's
    kv_head,
    KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [KEY_BLOCK, BLOCK] and values [BLOCK, VALUE_BLOCK] of one KV head.

    MASKED: values past `end` are 0. Their keys need not be, scores key_number a query are replaced.
    """
    row = token + tl.arange(0, BLOCK)
    if TMA:
        key = own.load([token, kv_head * KEY]).T
        value = own.load([token, KV_HEADS * KEY + kv_head * VALUE])
        if MASKED:
            value = tl.where((row < end)[:, None], value, 0.0)
    else:
        k = tl.arange(0, KEY_BLOCK)
        v = tl.arange(0, VALUE_BLOCK)
        there = row < end
        place = own + row.to(tl.int64) * own_stride
        keys = place[None, :] + (kv_head * KEY + k)[:, None]
        values = place[:, None] + (KV_HEADS * KEY + kv_head * VALUE + v)[None, :]
        key = tl.load(keys, mask=(k < KEY)[:, None] & there[None, :], other=0.0)
        value = tl.load(values, mask=there[:, None] & (v < VALUE)[None, :], other=0.0)
    return key, value


@triton.jit
def _fold_own(
    q,
    number,  # [ROWS] of the queries in their chunk, of which `first` is the lowest
    first, lowest, offset, count, own, own_stride, kv_head,
    mixed, peak, total, inner, outer,
    KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Fold the chunk's own keys, up to the last query's, into a softmax. With a WINDOW, none before
    number `lowest` is seen, which is below 0 where the window reaches out of the chunk.
    """
    middle = tl.maximum(lowest, 0) // BLOCK * BLOCK
    if not WINDOW:  # whole blocks that every query of the tile sees
        middle = (first + 1) // BLOCK * BLOCK
        for low in range(0, middle, BLOCK):
            key, value = _own_tile(
                own, own_stride, offset + low, offset + count, kv_head,
                KV_HEADS, KEY, VALUE, BLOCK, KEY_BLOCK, VALUE_BLOCK, TMA, False,
            )  # fmt: skip
            mixed, peak, total = fold(q, key, value, None, mixed, peak, total, inner, outer, CAPPED)
    for low in range(middle, tl.minimum(first + QUERIES, count), BLOCK):
        key, value = _own_tile(
            own, own_stride, offset + low, offset + count, kv_head,
            KV_HEADS, KEY, VALUE, BLOCK, KEY_BLOCK, VALUE_BLOCK, TMA, True,
        )  # fmt: skip
        key_number = low + tl.arange(0, BLOCK)[None, :]
        seen = key_number <= number[:, None]
        if WINDOW:
            seen = seen & (key_number > number[:, None] - WINDOW)
        mixed, peak, total = fold(q, key, value, seen, mixed, peak, total, inner, outer, CAPPED)
    return mixed, peak, total


@triton.jit(do_not_specialize_on_alignment=["pages"])
def prefill_kernel(
    query,  # [tokens, heads, KEY]
    own, own_stride,  # see `_own_tile`
    pool,  # [positions, KV_HEADS * (KEY + VALUE)]
    pages,  # that hold the positions before each chunk, one chunk after the other
    tiles,  # [tiles, 5] int32: offset, count, start of the chunk; its first of `pages`; first query
    sinks,  # [heads] or None
    output,  # [tokens, heads, VALUE]
    query_stride, head_stride, inner, outer,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Queries of one chunk, ROWS // HEADS of them, and HEADS of their heads a program.

    Grid [heads // HEADS, tiles]; HEADS divides GROUP, the query heads of a KV head.
    """
    QUERIES: tl.constexpr = ROWS // HEADS
    first_head = tl.program_id(0) * HEADS
    kv_head = first_head // GROUP
    tile = tiles + tl.program_id(1) * 5
    offset, count, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    before = pages + tl.load(tile + 3)
    first = tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    number = first + r // HEADS  # of the query in its chunk
    real = (number < count) & (r < QUERIES * HEADS)
    head = first_head + r % HEADS
    token = (offset + number).to(tl.int64)
    q = query_tile(query, token * query_stride + head * head_stride, real, KEY, KEY_BLOCK)
    lowest = tl.maximum(start + first - WINDOW + 1, 0) if WINDOW else 0
    mixed, peak, total = over_pages(
        q, start + number, lowest, start, pool, before, kv_head, inner, outer,
        KV_HEADS, KEY, VALUE, PAGE, False, WINDOW, CAPPED, BLOCK, KEY_BLOCK, VALUE_BLOCK,
    )  # fmt: skip
    mixed, peak, total = _fold_own(
        q, number, first, lowest - start, offset, count, own, own_stride, kv_head,
        mixed, peak, total, inner, outer,
        KV_HEADS, KEY, VALUE, WINDOW, CAPPED, QUERIES, BLOCK, KEY_BLOCK, VALUE_BLOCK, TMA,
    )  # fmt: skip
    mean = finish(mixed, peak[:, None], total[:, None], sinks, head[:, None], real[:, None])
    store_rows(output, token * (KV_HEADS * GROUP) + head, real, mean, VALUE)
