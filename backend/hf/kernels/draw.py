"""The draw of one token from each row of logits: a survey of all of them, then a settlement.

The survey reads every logit once: rows * vocabulary * 4 bytes over the read rate, at 256 rows of
151,936 34 us on an H200; the settlement is launch-bound, but for rows with top_p alone, which it
reads again. Reference: `tests/backend/hf/kernels/test_draw_kernel.py`.

A draw is a Gumbel maximum (Gumbel 1954; Maddison et al. 2014): the token whose logit / temperature
- log(E) is highest, E exponential, from a hash of (seed, position, token): SplitMix64 (Steele et
al. 2014) makes two words of seed and position, three rounds of multiply and xorshift mix them with
the token (constants of Wellons' triple32, 2018; after two rounds pairs of tokens are correlated).
Among the tokens that filters keep the highest is the draw too, so tokens are tried from the highest
down until one is kept. A filter that keeps a token keeps every more probable one, so a refusal
leaves only more probable tokens, and few are refused.

Scores are in powers of two. Weights are those of `backend.hf.sampling.draw`: whole numbers, so that
sums are exact in any order. A key is a logit's bits as an int32 of the same order, as a radix sort
has it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SETTINGS = tl.constexpr(5)  # columns of `settings`: see `SlotStates.settings`
WEIGHT_ONE = tl.constexpr(1 << 40)
SHARE_BITS = tl.constexpr(31)
SHARE_ONE = tl.constexpr(1 << 31)
LEAST_KEY = tl.constexpr(-2139095041)  # of -inf
NO_KEY = tl.constexpr(-2147483648)  # below that of any value
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _values(row_logits, token, there):
    """Logits of `token`, NaN and what is not `there` as -inf."""
    value = tl.load(row_logits + token, mask=there, other=float("-inf"))
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def _key(value):
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _of_key(key):
    """The logit with that key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _row_words(seed, position):
    """The two halves of output number `position` of SplitMix64 from `seed`, uint32."""
    mixed = seed.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    mixed = mixed ^ (mixed >> 31)
    return mixed.to(tl.uint32), (mixed >> 32).to(tl.uint32)


@triton.jit
def _score(value, token, factor, low, high):
    """value * factor - log2(E), `factor` being log2(e) / temperature; the row's words are `low` and
    `high`.

    E is -log(1 - share) for a share of 32 bits. The small ones decide, and there 1 - share would
    round: they come of the series, right to 4e-6 of themselves like the others. Written as fma, for
    the same bits wherever this is compiled.
    """
    word = token.to(tl.uint32) ^ low
    word = (word ^ (word >> 17)) * 0xED5AD4BB + high
    word = (word ^ (word >> 11)) * 0xAC4C1B51
    word = (word ^ (word >> 15)) * 0x31848BAB
    word = word ^ (word >> 14)
    share = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    small = tl.fma(share, tl.fma(share, 0.25, 0.3333333333), 0.5)
    small = tl.fma(small, share, 1.0) * share
    # the logarithm of the chip: to 2**-22, absolute near 1, relative elsewhere
    large = libdevice.fast_log2f(tl.maximum(1.0 - share, 5.9604644775390625e-08)) * -LN2
    return tl.fma(value, factor, -libdevice.fast_log2f(tl.where(share < 0.0625, small, large)))


@triton.jit
def _weight(value, peak, factor):
    """Probability as a whole number; means nothing where the `peak` is infinite."""
    return (tl.exp2((value - peak) * factor) * WEIGHT_ONE).to(tl.int64)


@triton.jit
def _part(total, share):
    """total * share / 2**31, rounded down, exact: the product itself would overflow."""
    low = total & 0xFFFFFFFF
    return (((total >> 32) * share) << 1) + ((low * share) >> SHARE_BITS)


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def survey_kernel(
    logits,  # [rows, vocabulary] float32
    settings,  # [slots, SETTINGS] int64
    slots,  # [rows] int64
    positions,  # [rows] int64
    scores,  # [rows, splits] float32: the highest score of each split, its token, and
    names,  # [rows, splits] int32
    peaks,  # [rows, splits] float32: the highest logit; of rows without top_k
    maxima,  # [rows, chunks] float32: the highest logit of each CHUNK tokens; of rows with top_k
    row_stride, vocabulary, chunks,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A pass over the logits, BLOCK of them a program. Grid [splits, rows]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = split * BLOCK + tl.arange(0, BLOCK)
    value = _values(logits + row * row_stride, token, token < vocabulary)
    setting = settings + tl.load(slots + row) * SETTINGS
    temperature = tl.load(setting).to(tl.int32).to(tl.float32, bitcast=True)
    if tl.load(setting + 1) > 0:
        highest = tl.max(tl.reshape(value, (BLOCK // CHUNK, CHUNK)), 1)
        chunk = split * (BLOCK // CHUNK) + tl.arange(0, BLOCK // CHUNK)
        tl.store(maxima + row * chunks + chunk, highest, mask=chunk < chunks)
    else:
        score = value
        if temperature > 0:
            low, high = _row_words(tl.load(setting + 4), tl.load(positions + row))
            score = _score(value, token, LOG2E / temperature, low, high)
        best = tl.max(score, 0)
        cell = row * tl.num_programs(0) + split
        tl.store(scores + cell, best)
        tl.store(names + cell, tl.min(tl.where(score == best, token, NO_TOKEN), 0))
        tl.store(peaks + cell, tl.max(value, 0))


@triton.jit
def _tile_edge(key, wanted):
    """The key down to which `wanted` of the tile's or more lie: those of the most probable, with
    all that tie with the last. Keys of what is not there are NO_KEY.
    """
    low, high = tl.min(tl.where(key == NO_KEY, NO_TOKEN, key), 0), tl.max(key, 0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # between them, rounded up
        number = tl.sum((key >= middle).to(tl.int32), 0)
        high = tl.where(number > wanted, high, tl.where(number == wanted, middle, middle - 1))
        low = tl.where(number >= wanted, middle, low)
    return low


@triton.jit
def _row_edge(row_logits, vocabulary, wanted, high, BLOCK: tl.constexpr):
    """`_tile_edge` of a whole row; `high`: its highest key."""
    low = tl.full([], LEAST_KEY, tl.int32)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        number = 0
        for begin in range(0, vocabulary, BLOCK):
            token = begin + tl.arange(0, BLOCK)
            there = token < vocabulary
            reached = there & (_key(_values(row_logits, token, there)) >= middle)
            number += tl.sum(reached.to(tl.int32), 0)
        high = tl.where(number > wanted, high, tl.where(number == wanted, middle, middle - 1))
        low = tl.where(number >= wanted, middle, low)
    return low


@triton.jit
def _collect(
    row_logits, highest, listed, found, found_names, vocabulary, chunks, wanted,
    CHUNK: tl.constexpr, LISTED: tl.constexpr, FOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the `wanted` most probable tokens, with some others, into `found`, in order of ids.

    As many chunks have a maximum not below the `wanted`-th highest maximum, `highest` [padded
    chunks]; no token below it is among the most probable, so only those chunks are read. Returns
    how many tokens there are: too many to be written where they are more than FOUND.
    """
    chunk = tl.arange(0, highest.shape[0])
    key = tl.where(chunk < chunks, _key(highest), NO_KEY)
    edge = tl.full([], LEAST_KEY, tl.int32)
    if wanted <= chunks:
        edge = _tile_edge(key, wanted)
    near = key >= edge
    rank = tl.cumsum(near.to(tl.int32), 0) - 1
    tl.store(listed + rank, chunk, mask=near & (rank < LISTED))
    number = tl.sum(near.to(tl.int32), 0)
    tl.debug_barrier()
    count = tl.where(number > LISTED, FOUND + 1, 0)
    for begin in range(0, tl.where(number > LISTED, 0, number), BLOCK // CHUNK):
        at = begin + tl.arange(0, BLOCK) // CHUNK
        of = tl.load(listed + at, mask=at < number, other=0)
        token = of * CHUNK + tl.arange(0, BLOCK) % CHUNK
        there = (at < number) & (token < vocabulary)
        value = _values(row_logits, token, there)
        hit = there & (_key(value) >= edge)
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(found + place, value, mask=hit & (place < FOUND))
        tl.store(found_names + place, token, mask=hit & (place < FOUND))
        count += tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def _best(
    values, names, named, count, edge, floor, least, peak, factor, low, high, BLOCK: tl.constexpr
):
    """The token of the highest score among those not below `edge`, above `floor`, and with a weight
    of `least` or more; 0 if there is none.

    `values` are of tokens 0 .. count - 1, or of `names` where `named`.
    """
    best = tl.full([], float("-inf"), tl.float32)
    chosen = tl.zeros([], tl.int32)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        there = place < count
        value = _values(values, place, there)
        token = tl.load(names + place, mask=there & named, other=place)
        likely = (value == peak) | (_weight(value, peak, factor) >= least)
        possible = (value >= edge) & (value > floor) & likely
        score = _score(value, token, factor, low, high)
        score = tl.where(possible, score, float("-inf"))
        top = tl.max(score, 0)
        first = tl.min(tl.where(score == top, token, NO_TOKEN), 0)
        chosen = tl.where(top > best, first, chosen)
        best = tl.maximum(top, best)
    return chosen


@triton.jit
def _mass(values, count, edge, bound, peak, factor, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Sums of the weights above `bound`, and of those not below `edge`, which is not above it."""
    above = tl.zeros([], tl.int64)
    total = tl.zeros([], tl.int64)
    for begin in tl.range(0, count, BLOCK, num_stages=STAGES):
        place = begin + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < count, other=float("-inf"))
        weight = _weight(value, peak, factor)  # of NaN, which compares to nothing, is left out
        above += tl.sum(tl.where(value > bound, weight, 0), 0)
        total += tl.sum(tl.where(value >= edge, weight, 0), 0)
    return above, total


@triton.jit
def _largest(
    own, maxima, listed, found, found_names, vocabulary, chunks, wanted,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr, FOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the `wanted` most probable tokens of a row lie: values, their number, whether they are
    named, the value of the last one wanted, and the highest of all.
    """
    chunk = tl.arange(0, CHUNKS)
    highest = tl.load(maxima + chunk, mask=chunk < chunks, other=float("-inf"))
    peak = tl.max(highest, 0)
    number = _collect(
        own, highest, listed, found, found_names, vocabulary, chunks, wanted,
        CHUNK, LISTED, FOUND, BLOCK,
    )  # fmt: skip
    named = number <= FOUND
    if named:
        values, count = found, number
        place = tl.arange(0, FOUND)
        key = tl.where(place < count, _key(_values(found, place, place < count)), NO_KEY)
        edge = _tile_edge(key, wanted)
    else:
        values, count = own, vocabulary
        edge = _row_edge(own, vocabulary, wanted, _key(peak), BLOCK)
    return values, count, named, _of_key(edge), peak


@triton.jit
def _first_kept(
    own, values, names, named, count, edge, token, top_p, least, peak, factor, low, high,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From `token`, the highest score not below `edge`, down to the first that top_p keeps and
    whose weight is `least` or more.
    """
    refused = token >= 0
    while refused:
        value = _values(own, token, token >= 0)
        refused = (value < peak) & (_weight(value, peak, factor) < least)
        if top_p < SHARE_ONE:
            above, total = _mass(values, count, edge, value, peak, factor, BLOCK, STAGES)
            refused = refused | ((value < peak) & (above >= _part(total, top_p)))
        if refused:
            token = _best(
                values, names, named, count, edge, value, least, peak, factor, low, high, BLOCK
            )
    return token


@triton.jit(do_not_specialize_on_alignment=["slots", "positions"])
def settle_kernel(
    logits, settings, slots, positions, scores, names, peaks, maxima,  # as in the survey
    listed,  # [rows, LISTED] int32, and
    found,  # [rows, FOUND] float32, and
    found_names,  # [rows, FOUND] int32: room for `_collect`
    tokens,  # [rows] int64
    last_token,  # [slots] int64
    row_stride, vocabulary, splits, chunks,
    SPLITS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr,
    FOUND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token of a row from its survey. Grid [rows]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    setting = settings + slot * SETTINGS
    s = tl.arange(0, SPLITS)
    cell = row * splits + s
    score = tl.load(scores + cell, mask=s < splits, other=float("-inf"))
    name = tl.load(names + cell, mask=s < splits, other=NO_TOKEN)
    top_k, top_p, min_p = tl.load(setting + 1), tl.load(setting + 2), tl.load(setting + 3)
    token = tl.min(tl.where(score == tl.max(score, 0), name, NO_TOKEN), 0)
    temperature = tl.load(setting).to(tl.int32).to(tl.float32, bitcast=True)
    if (temperature > 0) & ((top_k > 0) | (top_p < SHARE_ONE) | (min_p > 0)):
        factor = LOG2E / temperature
        low, high = _row_words(tl.load(setting + 4), tl.load(positions + row))
        peak = tl.max(tl.load(peaks + cell, mask=s < splits, other=float("-inf")), 0)
        least = _part(min_p * 0 + WEIGHT_ONE, min_p)
        own, own_names = logits + row * row_stride, found_names + row * FOUND
        values, count, named = own, vocabulary, top_k < 0
        edge = tl.full([], float("-inf"), tl.float32)
        if top_k > 0:
            values, count, named, edge, peak = _largest(
                own, maxima + row * chunks, listed + row * LISTED, found + row * FOUND, own_names,
                vocabulary, chunks, top_k.to(tl.int32), CHUNKS, CHUNK, LISTED, FOUND, BLOCK,
            )  # fmt: skip
            token = _best(
                values, own_names, named, count, edge, float("-inf"), least, peak, factor,
                low, high, BLOCK,
            )  # fmt: skip
        token = _first_kept(
            own, values, own_names, named, count, edge, token, top_p, least, peak, factor,
            low, high, BLOCK, STAGES,
        )  # fmt: skip
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(last_token + slot, token.to(tl.int64))
