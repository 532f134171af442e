"""Decode attention over pages: one query a row, the keys of all rows dealt out to programs.

Reads every key and value once: positions * row * itemsize bytes over the read rate, at 16/8 heads
of 128 in bf16 0.25 ms for 256 rows of 1,100 on an H200; one row is bound by its chain of loads,
plan, place, key, some 4 us. Reference: `tests/backend/hf/kernels/test_paged_attention.py`.

The blocks of keys of all rows stand in one list, made on the device once a step, so that a graph
serves every length. A program folds a range of it, rows or parts of rows, without a pause between
them: a block is loaded while the one before is folded, also where another row begins. A row's parts
are joined by the last of them to end, not by a launch of their own.
Even ranges: Stream-K, Osama et al. 2023; of decode attention: LeanAttention, Sanovar et al. 2024.
Split rows: Flash-Decoding, Dao et al. 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

from backend.hf.kernels.paged_attention import (
    NOTHING,
    arrive,
    empty,
    finish,
    fold,
    query_tile,
    store_rows,
    tile_at,
)

BLOCK_FIELDS = 4  # of a block: its row, the first and end of what is seen of it, its edges
FIELDS = tl.constexpr(BLOCK_FIELDS)
STARTS, ENDS = tl.constexpr(1), tl.constexpr(2)  # edges: a row's first block, its last
ROW_BLOCK = tl.constexpr(256)  # rows whose lengths are read at once
LISTED = tl.constexpr(256)  # entries of a list that are written at once
JOINED = tl.constexpr(1024)  # elements of parts that are joined at once


@triton.jit
def _reach(lengths, row, rows, WINDOW: tl.constexpr, SPAN: tl.constexpr):
    """Each row's length, and the first position of the spans it reads; 0 past the last row."""
    length = tl.load(lengths + row, mask=row < rows, other=0).to(tl.int32)
    low = tl.maximum(length - WINDOW, 0) // SPAN * SPAN if WINDOW else 0 * length
    return length, low


@triton.jit
def _count(
    lengths, rows,
    size,  # blocks of a range at most
    WINDOW: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks of the first `rows` rows, and the ranges that they make if each is cut by itself."""
    blocks = tl.zeros([ROW_BLOCK], tl.int32)
    ranges = tl.zeros([ROW_BLOCK], tl.int32)
    for first in range(0, rows, ROW_BLOCK):
        row = first + tl.arange(0, ROW_BLOCK)
        length, low = _reach(lengths, row, rows, WINDOW, SPAN)
        own = tl.cdiv(length - low, BLOCK)
        blocks += own
        ranges += tl.cdiv(own, size)
    return tl.sum(blocks, 0), tl.sum(ranges, 0)


@triton.jit(do_not_specialize=["rows", "programs", "wanted", "kv_heads"])
def plan_kernel(
    lengths,  # [rows]
    slots,  # [rows]
    table, table_stride,  # [slots, max_pages]
    blocks,  # [blocks, FIELDS] int32
    places,  # [blocks, BLOCK // SPAN] int32: position in the pool of each span's first token
    ranges,  # [programs + 1] int32: a program's first block; the end of the last
    parts_of,  # [rows, 2] int32: the first program that folds a row, and how many do
    counters,  # [rows, kv_heads] int32
    rows, programs, wanted, kv_heads,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr, SMALLEST: tl.constexpr, WIDEST: tl.constexpr,
):  # fmt: skip
    """List the blocks of each row, and deal them out to programs. Grid [rows].

    EVEN: to all programs alike. Else each row is cut by itself, into ranges of `size` blocks at
    most: the least multiple of SMALLEST that makes no more than rows + wanted ranges.
    SPAN divides PAGE and BLOCK. WIDEST > programs.
    """
    own = tl.program_id(0)
    total, _ = _count(lengths, rows, 1, WINDOW, SPAN, BLOCK)
    size = tl.cdiv(tl.cdiv(total, wanted), SMALLEST) * SMALLEST
    begin, before = _count(lengths, own, size, WINDOW, SPAN, BLOCK)
    length, low = _reach(lengths, own, rows, WINDOW, SPAN)
    count = tl.cdiv(length - low, BLOCK)
    number = tl.arange(0, WIDEST)
    if EVEN:
        used = tl.minimum(programs, total)
        before = ((begin + 1) * used - 1) // total
        parts = ((begin + count) * used - 1) // total - before + 1
        if own == 0:
            first = tl.minimum(number, used) * total // used
            tl.store(ranges + number, first, mask=number <= programs)
    else:
        parts = tl.cdiv(count, size)
        tl.store(ranges + before + number, begin + count * number // parts, mask=number < parts)
        if own == rows - 1:
            behind = before + parts + number
            tl.store(ranges + behind, total, mask=behind <= programs)
    tl.store(parts_of + own * 2, before)
    tl.store(parts_of + own * 2 + 1, parts)
    for head in range(kv_heads):
        tl.store(counters + own * kv_heads + head, 0)
    pages = table + tl.load(slots + own).to(tl.int64) * table_stride
    _list_blocks(own, length, low, begin, count, pages, blocks, places, WINDOW, PAGE, SPAN, BLOCK)


@triton.jit
def _list_blocks(
    row, length, low, begin, count, pages, blocks, places,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a row's `count` blocks to the list, from `begin` on."""
    entry = tl.arange(0, LISTED)
    unseen = tl.maximum(length - WINDOW, 0) - low if WINDOW else 0
    for first in range(0, count, LISTED):
        n = first + entry
        block, there = blocks + (begin + n) * FIELDS, n < count
        edges = tl.where(n == 0, STARTS, 0) | tl.where(n == count - 1, ENDS, 0)
        tl.store(block, row, mask=there)
        tl.store(block + 1, tl.where(n == 0, unseen, 0), mask=there)
        tl.store(block + 2, tl.minimum(length - low - n * BLOCK, BLOCK), mask=there)
        tl.store(block + 3, edges, mask=there)
    for first in range(0, tl.cdiv(length - low, SPAN), LISTED):
        position = low + (first + entry) * SPAN
        there = position < length
        page = tl.load(pages + position // PAGE, mask=there, other=0).to(tl.int32)
        at = begin * (BLOCK // SPAN) + first + entry
        tl.store(places + at, page * PAGE + position % PAGE, mask=there)


@triton.jit(do_not_specialize=["settled"])
def decode_kernel(
    query,  # [rows, heads, KEY]
    pool,  # [positions, KV_HEADS * (KEY + VALUE)]
    blocks, places, ranges, parts_of, counters,  # by `plan_kernel`
    sinks,  # [heads] or None
    output,  # [rows, heads, VALUE]
    parts,  # [2 * programs, heads, VALUE] float32: sums of parts of rows, not yet divided
    peaks, totals,  # [2 * programs, heads] float32
    query_stride, head_stride, inner, outer,
    settled,  # whether another launch stands between the plan's and this one
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    SPAN: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Attend over a range of blocks. Grid [KV_HEADS, programs]. CHAINED: launched dependent.

    A program has two cells for parts: of the row that it goes on with, and of the row that it
    begins and leaves to the next.
    """
    if CHAINED and settled == 0:
        tl.extra.cuda.gdc_wait()
    kv_head, program = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(ranges + program), tl.load(ranges + program + 1)
    row, low, high, edges = _block(blocks, tl.minimum(begin, end - 1))  # the range may be empty
    last_row = tl.load(blocks + (end - 1) * FIELDS)
    first, count = tl.load(parts_of + row * 2), tl.load(parts_of + row * 2 + 1)
    last_first, last_count = tl.load(parts_of + last_row * 2), tl.load(parts_of + last_row * 2 + 1)
    if CHAINED:
        if settled != 0:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if begin >= end:
        return
    begun, left = _fold_range(
        query, pool, blocks, places, sinks, output, parts, peaks, totals,
        query_stride, head_stride, inner, outer, kv_head, program, begin, end,
        row, low, high, edges, GROUP, KV_HEADS, KEY, VALUE, SPAN, CAPPED, ROWS, BLOCK,
        KEY_BLOCK, VALUE_BLOCK,
    )  # fmt: skip
    if (edges & STARTS) == 0:
        _arrive(
            row, first, count, kv_head, counters, parts, peaks, totals, sinks, output,
            GROUP, KV_HEADS, VALUE,
        )  # fmt: skip
    if left & begun:
        _arrive(
            last_row, last_first, last_count, kv_head, counters, parts, peaks, totals, sinks,
            output, GROUP, KV_HEADS, VALUE,
        )  # fmt: skip


@triton.jit
def _fold_range(
    query, pool, blocks, places, sinks, output, parts, peaks, totals,
    query_stride, head_stride, inner, outer, kv_head, program, begin, end,
    row, low, high, edges,  # of the first block
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    SPAN: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the output of each row that is whole here, and the parts of others. Returns whether the
    last row began here, and whether it goes on in the next program.

    A block's fields are read an iteration ahead, its places in its own: so the compiler can load
    keys and values while the block before is multiplied.
    """
    r = tl.arange(0, ROWS)
    real = r < GROUP
    head = kv_head * GROUP + r
    lane = tl.arange(0, BLOCK)
    cell = 2 * program * (KV_HEADS * GROUP) + head
    begun = (edges & STARTS) != 0
    mixed, peak, total = empty(ROWS, VALUE_BLOCK)
    for block in range(begin, end):
        place = tl.load(places + block * (BLOCK // SPAN) + lane // SPAN) + lane % SPAN
        there = (lane >= low) & (lane < high)
        key, value = tile_at(
            pool, place, there, kv_head, KV_HEADS, KEY, VALUE, KEY_BLOCK, VALUE_BLOCK
        )
        own = query + row.to(tl.int64) * query_stride
        q = query_tile(own, head * head_stride, real, KEY, KEY_BLOCK)
        seen = there[None, :]
        mixed, peak, total = fold(q, key, value, seen, mixed, peak, total, inner, outer, CAPPED)
        ends = (edges & ENDS) != 0
        if ends & begun:
            _store_row(row, head, real, mixed, peak, total, sinks, output, GROUP, KV_HEADS, VALUE)
        if ends & (not begun):
            _store_part(parts, peaks, totals, cell, real, mixed, peak, total, VALUE)
        begun = begun | ends
        mixed = tl.where(ends, 0.0, mixed)
        peak = tl.where(ends, NOTHING, peak)
        total = tl.where(ends, 0.0, total)
        row, low, high, edges = _block(blocks, tl.minimum(block + 1, end - 1))
    left = (edges & ENDS) == 0
    if left:
        cell += begun.to(tl.int32) * (KV_HEADS * GROUP)
        _store_part(parts, peaks, totals, cell, real, mixed, peak, total, VALUE)
    return begun, left


@triton.jit
def _store_row(
    row, head, real, mixed, peak, total, sinks, output,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    mean = finish(mixed, peak[:, None], total[:, None], sinks, head[:, None], real[:, None])
    store_rows(output, row.to(tl.int64) * (KV_HEADS * GROUP) + head, real, mean, VALUE)


@triton.jit
def _block(blocks, number):
    """A block's fields."""
    block = blocks + number * FIELDS
    return tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)


@triton.jit
def _store_part(parts, peaks, totals, cell, real, mixed, peak, total, VALUE: tl.constexpr):
    store_rows(parts, cell, real, mixed, VALUE)
    tl.store(peaks + cell, peak, mask=real)
    tl.store(totals + cell, total, mask=real)


@triton.jit
def _arrive(
    row, first, count, kv_head, counters, parts, peaks, totals, sinks, output,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """One of a row's `count` parts is there: the last of them joins all."""
    if arrive(counters + row * KV_HEADS + kv_head, count):
        _join(
            parts, peaks, totals, sinks, output + row.to(tl.int64) * (KV_HEADS * GROUP * VALUE),
            first, count, kv_head, GROUP, KV_HEADS, VALUE,
        )  # fmt: skip


@triton.jit
def _join(
    parts, peaks, totals, sinks, output,
    first,  # program: the row begins in its second cell and goes on in the others' first
    count, kv_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Write the output of a row of `count` parts."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(GROUP * VALUE)
    PARTS: tl.constexpr = max(1, JOINED // COLUMNS)
    AHEAD: tl.constexpr = 3 if PARTS > 1 else 1  # what is loaded ahead takes shared memory
    c = tl.arange(0, COLUMNS)
    real = c < GROUP * VALUE
    head = kv_head * GROUP + c // VALUE
    column = kv_head * (GROUP * VALUE) + c
    mixed = tl.zeros([COLUMNS], tl.float32)
    peak = tl.full([COLUMNS], NOTHING, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in tl.range(0, count, PARTS, num_stages=AHEAD):
        number = begin + tl.arange(0, PARTS)
        cell = 2 * (first + number) + (number == 0).to(tl.int32)
        at = (cell * (KV_HEADS * GROUP))[:, None]
        there = (number < count)[:, None] & real[None, :]
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
