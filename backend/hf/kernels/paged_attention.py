"""Softmax attention over paged keys and values: split decode, its reduction, and prefill.

Decode reads every key and value once: positions * row * itemsize bytes over the read rate, at 16/8
heads of 128 in bf16 0.23 ms for 256 rows of 1,000 on an H200. Prefill is bound by its products: 4 *
heads * width operations for each pair of query and key. Running softmax: Milakov and Gimelshein
2018, in tiles: Dao et al. 2022; splits of one row: Flash-Decoding, Dao et al. 2023.
Reference: `tests/backend/hf/kernels/test_paged_attention.py`, which compares with `SdpaAttention`.

A tile holds the queries of one KV head: its rows are (query, head of the group), query-major, so
each key is read once for its group. Scores are kept in powers of two: softcap / log(2) *
tanh(product * scale / softcap), or product * scale / log(2), as `inner` and `outer` say.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1.0e38)  # peak of an empty softmax: finite, so differences are no NaN


@triton.jit
def _begin(sinks, head, real, first, ROWS: tl.constexpr):
    """Peak and total [ROWS] of a softmax before its first key: empty, or the heads' sinks.

    Only the `first` of a row's splits counts the sink.
    """
    if sinks is None:
        peak = tl.full([ROWS], NOTHING, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    else:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        peak = tl.where(first, sink, NOTHING)
        total = tl.where(first, 1.0, 0.0) + tl.zeros([ROWS], tl.float32)
    return peak, total


@triton.jit
def _fold(
    query,  # [ROWS, padded KEY]
    at,  # [ROWS] position of each query
    low, high,
    mixed,  # [ROWS, padded VALUE] float32: the running sum of values
    peak, total, pool, pages, kv_head, inner, outer,
    KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold the keys at positions `low` .. `high` into a running softmax.

    Without MASKED every query sees all of them, and they are whole blocks.
    """
    ROW: tl.constexpr = KV_HEADS * (KEY + VALUE)
    k = tl.arange(0, query.shape[1])
    v = tl.arange(0, mixed.shape[1])
    keys = pool + kv_head * KEY + k[:, None]
    values = pool + KV_HEADS * KEY + kv_head * VALUE + v[None, :]
    in_key, in_value = k < KEY, v < VALUE
    for begin in range(low, high, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        there = position < high
        page = tl.load(pages + position // PAGE, mask=there, other=0)
        place = (page * PAGE + position % PAGE) * ROW
        key = tl.load(keys + place[None, :], mask=in_key[:, None] & there[None, :], other=0.0)
        score = tl.dot(query, key, input_precision="ieee") * inner
        if CAPPED:
            score = outer * (2.0 * tl.sigmoid(2.0 * score) - 1.0)
        if MASKED:
            seen = position[None, :] <= at[:, None]
            if WINDOW:
                seen &= position[None, :] > at[:, None] - WINDOW
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weight, 1)
        # a position that is not there is 0, not what a former owner of its page left: 0 * NaN
        whole = there[:, None] & in_value[None, :]
        value = tl.load(values + place[:, None], mask=whole, other=0.0)
        mixed = tl.dot(weight.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
        peak = higher
    return mixed, peak, total


@triton.jit(do_not_specialize=["page_stride", "splits"])
def decode_kernel(
    query,  # [rows, heads, KEY]
    pool,  # [positions, KV_HEADS * (KEY + VALUE)]
    pages,  # [rows, max_pages]
    lengths,  # [rows]
    sinks,  # [heads] or None
    output,  # [rows, heads, VALUE], or [rows, heads, splits, VALUE] float32: sums not yet divided
    peaks,  # [rows, heads, splits] float32 and
    totals,  # the like, or None: one split, divided
    query_stride, head_stride, page_stride, splits, inner, outer,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One query a row. Grid [KV_HEADS, splits, rows]: a program reads one of `splits` stretches."""
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    start = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    stretch = tl.cdiv(tl.cdiv(length - start, BLOCK), splits) * BLOCK
    low = start + split * stretch
    high = tl.minimum(low + stretch, length)
    r = tl.arange(0, ROWS)
    k = tl.arange(0, KEY_BLOCK)
    v = tl.arange(0, VALUE_BLOCK)
    real = r < GROUP
    head = kv_head * GROUP + r
    place = query + row * query_stride + head[:, None] * head_stride + k[None, :]
    q = tl.load(place, mask=real[:, None] & (k < KEY)[None, :], other=0.0)
    peak, total = _begin(sinks, head, real, split == 0, ROWS)
    mixed = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    at = tl.zeros([ROWS], tl.int32) + length - 1
    own_pages = pages + row * page_stride
    mixed, peak, total = _fold(
        q, at, low, high, mixed, peak, total, pool, own_pages, kv_head, inner, outer,
        KV_HEADS, KEY, VALUE, PAGE, WINDOW, CAPPED, True, BLOCK,
    )  # fmt: skip
    cell = (row * (KV_HEADS * GROUP) + head) * splits + split
    if totals is None:
        mixed = mixed / total[:, None]
    else:
        tl.store(peaks + cell, peak, mask=real)
        tl.store(totals + cell, total, mask=real)
    place = output + cell[:, None] * VALUE + v[None, :]
    tl.store(place, mixed.to(output.dtype.element_ty), mask=real[:, None] & (v < VALUE)[None, :])


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    mixed,  # [rows, heads, splits, VALUE] float32
    peaks,  # [rows, heads, splits] float32
    totals,  # [rows, heads, splits] float32
    output,  # [rows, heads, VALUE]
    splits,
    VALUE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    """Merge the splits of a row. Grid [rows * heads]."""
    cell = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLIT_BLOCK)
    v = tl.arange(0, VALUE_BLOCK)
    there = s < splits
    peak = tl.load(peaks + cell * splits + s, mask=there, other=NOTHING)
    total = tl.load(totals + cell * splits + s, mask=there, other=0.0)
    weight = tl.exp2(peak - tl.max(peak, 0))
    place = mixed + (cell * splits + s)[:, None] * VALUE + v[None, :]
    parts = tl.load(place, mask=there[:, None] & (v < VALUE)[None, :], other=0.0)
    merged = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(output + cell * VALUE + v, merged.to(output.dtype.element_ty), mask=v < VALUE)


@triton.jit
def prefill_kernel(
    query,  # [tokens, heads, KEY]
    pool,  # [positions, KV_HEADS * (KEY + VALUE)]
    pages,  # pages of all chunks, one chunk after the other
    tiles,  # [tiles, 5] int32: offset, count, start of the chunk; its first of `pages`; first query
    sinks,  # [heads] or None
    output,  # [tokens, heads, VALUE]
    query_stride, head_stride, inner, outer,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries of one chunk, ROWS // GROUP of them a program. Grid [KV_HEADS, tiles]."""
    kv_head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 5
    offset, count, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    own_pages = pages + tl.load(tile + 3)
    first = tl.load(tile + 4)
    r = tl.arange(0, ROWS)
    k = tl.arange(0, KEY_BLOCK)
    v = tl.arange(0, VALUE_BLOCK)
    number = first + r // GROUP  # of the query in its chunk
    real = (number < count) & (r < ROWS // GROUP * GROUP)
    head = kv_head * GROUP + r % GROUP
    token = (offset + number).to(tl.int64)
    place = query + (token * query_stride + head * head_stride)[:, None] + k[None, :]
    q = tl.load(place, mask=real[:, None] & (k < KEY)[None, :], other=0.0)
    peak, total = _begin(sinks, head, real, True, ROWS)
    mixed = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    at = start + number
    high = start + tl.minimum(first + ROWS // GROUP, count)
    if WINDOW:
        middle = tl.maximum(start + first - WINDOW + 1, 0)
    else:  # whole blocks that every query of the tile sees
        middle = (start + first + 1) // BLOCK * BLOCK
        mixed, peak, total = _fold(
            q, at, 0, middle, mixed, peak, total, pool, own_pages, kv_head, inner, outer,
            KV_HEADS, KEY, VALUE, PAGE, WINDOW, CAPPED, False, BLOCK,
        )  # fmt: skip
    mixed, peak, total = _fold(
        q, at, middle, high, mixed, peak, total, pool, own_pages, kv_head, inner, outer,
        KV_HEADS, KEY, VALUE, PAGE, WINDOW, CAPPED, True, BLOCK,
    )  # fmt: skip
    mixed = mixed / total[:, None]
    place = output + ((token * (KV_HEADS * GROUP) + head) * VALUE)[:, None] + v[None, :]
    tl.store(place, mixed.to(output.dtype.element_ty), mask=real[:, None] & (v < VALUE)[None, :])
