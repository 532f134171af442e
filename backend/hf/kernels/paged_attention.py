"""What the kernels of attention over paged keys and values share.

A tile holds queries that read one KV head: its rows are (query, head), query-major, so each key is
read once for the heads in it. Scores and peaks are kept in powers of two: product * inner, where
inner > 0 is scale / log(2); or, CAPPED, outer * tanh(product * inner), where outer is softcap /
log(2) and inner is scale / softcap. Running softmax: Milakov and Gimelshein 2018, in tiles: Dao et
al. 2022; joining parts of one row: Flash-Decoding, Dao et al. 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1.0e38)  # peak of an empty softmax: finite, so differences are no NaN


@triton.jit
def query_tile(query, row, real, KEY: tl.constexpr, KEY_BLOCK: tl.constexpr):
    """Queries [ROWS, KEY_BLOCK] that begin `row` [ROWS] elements into `query`; 0 if not real."""
    k = tl.arange(0, KEY_BLOCK)
    there = real[:, None] & (k < KEY)[None, :]
    return tl.load(query + row[:, None] + k[None, :], mask=there, other=0.0)


@triton.jit
def page_tile(
    pool,  # [positions, KV_HEADS * (KEY + VALUE)]
    pages,  # page ids of one sequence
    position,  # [BLOCK]
    there,  # [BLOCK] whether the position is to be read
    kv_head,
    KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PAGE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys [KEY_BLOCK, BLOCK] and values [BLOCK, VALUE_BLOCK] of one KV head.

    A position that is not there is 0, not what a former owner of its page left: 0 * NaN.
    """
    page = tl.load(pages + position // PAGE, mask=there, other=0)
    place = page * PAGE + position % PAGE
    return tile_at(pool, place, there, kv_head, KV_HEADS, KEY, VALUE, KEY_BLOCK, VALUE_BLOCK)


@triton.jit
def tile_at(
    pool,  # [positions, KV_HEADS * (KEY + VALUE)]
    place,  # [BLOCK] positions in the pool
    there,  # [BLOCK] whether it is to be read
    kv_head,
    KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and values as `page_tile` has them, whose places are known."""
    start = place.to(tl.int64) * (KV_HEADS * (KEY + VALUE))
    k = tl.arange(0, KEY_BLOCK)
    v = tl.arange(0, VALUE_BLOCK)
    keys = pool + kv_head * KEY + k[:, None]
    values = pool + KV_HEADS * KEY + kv_head * VALUE + v[None, :]
    key = tl.load(keys + start[None, :], mask=(k < KEY)[:, None] & there[None, :], other=0.0)
    whole = there[:, None] & (v < VALUE)[None, :]
    return key, tl.load(values + start[:, None], mask=whole, other=0.0)


@triton.jit
def empty(ROWS: tl.constexpr, VALUE_BLOCK: tl.constexpr):
    """A softmax of no keys: running sum of values [ROWS, VALUE_BLOCK], peak and total [ROWS]."""
    mixed = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    return mixed, tl.full([ROWS], NOTHING, tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def fold(
    query,  # [ROWS, KEY_BLOCK]
    key,  # [KEY_BLOCK, BLOCK]
    value,  # [BLOCK, VALUE_BLOCK]
    seen,  # broadcasts to [ROWS, BLOCK], or None: every query sees every key
    mixed, peak, total, inner, outer,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Fold a block of keys into a running softmax. A key that a row does not see leaves its bits
    as they are.
    """
    score = tl.dot(query, key, input_precision="ieee")
    rate = inner
    if CAPPED:
        score = outer * (2.0 * tl.sigmoid(2.0 * inner * score) - 1.0)
        rate = 1.0
    if seen is not None:
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1) * rate)
    weight = tl.exp2(score * rate - higher[:, None])
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(weight, 1)
    mixed = tl.dot(weight.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
    return mixed, higher, total


@triton.jit
def over_pages(
    query,  # [ROWS, KEY_BLOCK]
    at,  # [ROWS] positions of the queries, or None: neither CAUSAL nor WINDOW
    low, high,
    pool, pages, kv_head, inner, outer,
    KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PAGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The softmax of one sequence's positions `low` .. `high` - 1, read from its pages.

    CAUSAL: a query does not see those behind its own, where `high` is not enough to tell.
    """
    mixed, peak, total = empty(query.shape[0], VALUE_BLOCK)
    for begin in range(low, high, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        there = position < high
        key, value = page_tile(
            pool, pages, position, there, kv_head,
            KV_HEADS, KEY, VALUE, PAGE, KEY_BLOCK, VALUE_BLOCK,
        )  # fmt: skip
        seen = position[None, :] <= at[:, None] if CAUSAL else there[None, :]
        if WINDOW:
            seen = seen & (position[None, :] > at[:, None] - WINDOW)
        mixed, peak, total = fold(query, key, value, seen, mixed, peak, total, inner, outer, CAPPED)
    return mixed, peak, total


@triton.jit
def finish(mixed, peak, total, sinks, head, real):
    """The mean of the values, elementwise: all but `sinks` broadcast to `mixed`.

    `sinks` [heads] are logits, or None; that of `head` is read where it is `real`. Its sum is
    spelled as a fused one, so that the bits do not depend on what stands around it.
    """
    if sinks is not None:
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(peak, sink)
        fade = tl.exp2(peak - higher)
        mixed = mixed * fade
        total = tl.fma(total, fade, tl.exp2(sink - higher))
    return mixed / total


@triton.jit
def store_rows(place, row, real, values, VALUE: tl.constexpr):
    """Write `values` [ROWS, VALUE_BLOCK] to the rows `row` [ROWS] of `place` [rows, VALUE], where
    they are `real`.
    """
    v = tl.arange(0, values.shape[1])
    there = real[:, None] & (v < VALUE)[None, :]
    place += (row * VALUE)[:, None] + v[None, :]
    tl.store(place, values.to(place.dtype.element_ty), mask=there)


@triton.jit
def arrive(counter, expected):
    """Whether this program is the last of `expected`, all of whose stores it then sees.

    The counter is 0 before the first and after the last.
    """
    tl.debug_barrier()  # the atomic is one thread's: the others' stores come before it
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    return last
