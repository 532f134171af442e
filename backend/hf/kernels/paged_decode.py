"""Decode attention over pages: one query a row, rows cut into pieces by their lengths.

Reads every key and value once: positions * row * itemsize bytes over the read rate, at 16/8 heads
of 128 in bf16 0.25 ms for 256 rows of 1,100 on an H200; one row is bound by its chain of loads,
plan, page, key, some 4 us. Reference: `tests/backend/hf/kernels/test_paged_attention.py`.

Pieces are decided on the device once a step, so that a graph serves every length: all rows
together make about `wanted` pieces of like length, a short row one. A row's pieces are joined by
the last of them to end, not by a launch of their own. Split rows: Flash-Decoding, Dao et al. 2023.
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

PLAN_FIELDS = 8  # of a piece: its row, slot, first position and end, number, pieces, cell, unused
ROW_BLOCK = tl.constexpr(256)  # rows whose lengths are read at once
FIELDS = tl.constexpr(PLAN_FIELDS)
JOINED = tl.constexpr(2048)  # elements of parts that are joined at once


@triton.jit
def _seen(lengths, row, rows, WINDOW: tl.constexpr):
    """Positions that each row reads; 0 past the last row."""
    seen = tl.load(lengths + row, mask=row < rows, other=0).to(tl.int32)
    return tl.minimum(seen, WINDOW) if WINDOW else seen


@triton.jit(do_not_specialize=["rows", "wanted", "kv_heads"])
def plan_kernel(
    lengths,  # [rows]
    slots,  # [rows]
    plan,  # [1 + rows + wanted, FIELDS] int32: the number of pieces, then the pieces
    counters,  # [rows, kv_heads] int32
    rows, wanted, kv_heads,
    WINDOW: tl.constexpr, SMALLEST: tl.constexpr, WIDEST: tl.constexpr,
):  # fmt: skip
    """Cut each row into pieces of `size` positions at most. Grid [rows].

    size is the least multiple of SMALLEST that makes no more than rows + wanted pieces, and no more
    than 2 * wanted of them of split rows: those have a cell of the parts. WIDEST > wanted.
    """
    own = tl.program_id(0)
    block = tl.arange(0, ROW_BLOCK)
    sums = tl.zeros([ROW_BLOCK], tl.int32)
    for first in range(0, rows, ROW_BLOCK):
        sums += _seen(lengths, first + block, rows, WINDOW)
    size = tl.cdiv(tl.cdiv(tl.sum(sums, 0), wanted), SMALLEST) * SMALLEST
    before = tl.zeros([ROW_BLOCK], tl.int32)
    cells = tl.zeros([ROW_BLOCK], tl.int32)
    for first in range(0, own, ROW_BLOCK):
        cut = tl.cdiv(_seen(lengths, first + block, own, WINDOW), size)
        before += cut
        cells += tl.where(cut > 1, cut, 0)
    length = tl.load(lengths + own).to(tl.int32)
    slot = tl.load(slots + own).to(tl.int32)
    seen = tl.minimum(length, WINDOW) if WINDOW else length
    pieces = tl.cdiv(seen, size)
    even = tl.cdiv(tl.cdiv(seen, pieces), SMALLEST) * SMALLEST  # no more than size: none is empty
    number = tl.arange(0, WIDEST)
    low = length - seen + number * even
    piece = plan + (1 + tl.sum(before, 0) + number) * FIELDS
    mine = number < pieces
    tl.store(piece, own, mask=mine)
    tl.store(piece + 1, slot, mask=mine)
    tl.store(piece + 2, low, mask=mine)
    tl.store(piece + 3, tl.minimum(low + even, length), mask=mine)
    tl.store(piece + 4, number, mask=mine)
    tl.store(piece + 5, pieces, mask=mine)
    tl.store(piece + 6, tl.sum(cells, 0) + number, mask=mine)
    if own == rows - 1:
        tl.store(plan, tl.sum(before, 0) + pieces)
    for head in range(kv_heads):
        tl.store(counters + own * kv_heads + head, 0)


@triton.jit
def decode_kernel(
    query,  # [rows, heads, KEY]
    pool,  # [positions, KV_HEADS * (KEY + VALUE)]
    table,  # [slots, max_pages]
    plan, counters,  # by `plan_kernel`
    sinks,  # [heads] or None
    output,  # [rows, heads, VALUE]
    parts,  # [cells, heads, VALUE] float32: sums of pieces, not yet divided
    peaks, totals,  # [cells, heads] float32
    query_stride, head_stride, table_stride, inner, outer,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PAGE: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Attend over one piece. Grid [KV_HEADS, rows + wanted]. CHAINED: launched dependent."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, item = tl.program_id(0), tl.program_id(1)
    piece = plan + (1 + item) * FIELDS
    row, slot = tl.load(piece).to(tl.int64), tl.load(piece + 1).to(tl.int64)
    low, high = tl.load(piece + 2), tl.load(piece + 3)
    number, pieces, cell = tl.load(piece + 4), tl.load(piece + 5), tl.load(piece + 6)
    if item >= tl.load(plan):
        return
    r = tl.arange(0, ROWS)
    real = r < GROUP
    head = kv_head * GROUP + r
    q = query_tile(query + row * query_stride, head * head_stride, real, KEY, KEY_BLOCK)
    mixed, peak, total = over_pages(
        q, None, low, high, pool, table + slot * table_stride, kv_head, inner, outer,
        KV_HEADS, KEY, VALUE, PAGE, False, 0, CAPPED, BLOCK, KEY_BLOCK, VALUE_BLOCK,
    )  # fmt: skip
    if pieces == 1:
        mean = finish(mixed, peak[:, None], total[:, None], sinks, head[:, None], real[:, None])
        store_rows(output, row * (KV_HEADS * GROUP) + head, real, mean, VALUE)
    else:
        part = cell * (KV_HEADS * GROUP) + head
        store_rows(parts, part, real, mixed, VALUE)
        tl.store(peaks + part, peak, mask=real)
        tl.store(totals + part, total, mask=real)
        if arrive(counters + row * KV_HEADS + kv_head, pieces):
            _join(
                parts, peaks, totals, sinks, output + row * (KV_HEADS * GROUP * VALUE),
                cell - number, pieces, kv_head, GROUP, KV_HEADS, VALUE,
            )  # fmt: skip


@triton.jit
def _join(
    parts, peaks, totals, sinks, output, first, pieces, kv_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Write the output of a row whose pieces lie in `pieces` cells from `first` on."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(GROUP * VALUE)
    PIECES: tl.constexpr = max(1, JOINED // COLUMNS)
    AHEAD: tl.constexpr = 3 if PIECES > 1 else 1  # what is loaded ahead takes shared memory
    c = tl.arange(0, COLUMNS)
    real = c < GROUP * VALUE
    head = kv_head * GROUP + c // VALUE
    column = kv_head * (GROUP * VALUE) + c
    mixed = tl.zeros([COLUMNS], tl.float32)
    peak = tl.full([COLUMNS], NOTHING, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in tl.range(0, pieces, PIECES, num_stages=AHEAD):
        number = begin + tl.arange(0, PIECES)
        at = ((first + number) * (KV_HEADS * GROUP))[:, None]
        there = (number < pieces)[:, None] & real[None, :]
        part = tl.load(parts + at * VALUE + column[None, :], mask=there, other=0.0)
        tops = tl.load(peaks + at + head[None, :], mask=there, other=NOTHING)
        sums = tl.load(totals + at + head[None, :], mask=there, other=0.0)
        higher = tl.maximum(peak, tl.max(tops, 0))
        weight, fade = tl.exp2(tops - higher[None, :]), tl.exp2(peak - higher)
        mixed = mixed * fade + tl.sum(part * weight, 0)
        total = total * fade + tl.sum(sums * weight, 0)
        peak = higher
    mean = finish(mixed, peak, total, sinks, head, real)
    tl.store(output + column, mean.to(output.dtype.element_ty), mask=real)
