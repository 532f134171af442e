"""One token from each row of logits: a pure function of (logits, seed, position).

After one `exp` everything is integer arithmetic. A probability becomes a whole weight, 2**40 for
the most probable token, so that sums are exact in any order, on any device, in any company. Tokens
below 2**-40 of the most probable are never drawn.

Inverse CDF in id order; the uniform is SplitMix64 as a hash of (seed, position), Steele et al.
2014. Nucleus (top_p): Holtzman et al. 2020. min_p: Nguyen et al. 2024.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WEIGHT_ONE = 1 << 40  # of the most probable token; a vocabulary of 2**22 sums to less than 2**63
SHARE_BITS = 31  # bits of a fraction: of a uniform, of top_p, of min_p
LARGEST = 65  # candidates of the short way: one more than a top_k of 64, so that ties show
BLOCK = 1 << 18  # logits at a time on a CPU: five times faster than fresh pages for a large batch
DEVICE_BLOCK = 1 << 25  # elsewhere: a temporary of 256 MiB
DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, bits): a non-negative float's 31 bits


class DrawParams(NamedTuple):
    """What rows are drawn by, one entry a row."""

    temperature: Tensor  # [rows] float32, above 0
    top_k: Tensor  # [rows] int64, at most the vocabulary; read where a group has top_k
    top_p: Tensor  # [rows] int64 share, see `as_share`; read where a group has top_p
    min_p: Tensor  # [rows] int64 share
    seed: Tensor  # [rows] int64

    def select(self, rows: Tensor | slice) -> DrawParams:
        """The entries of some rows."""
        return DrawParams(*(column[rows] for column in self))


class Filters(NamedTuple):
    """Which filters a group of rows uses."""

    top_k: bool
    top_p: bool
    min_p: bool


def as_share(fraction: float) -> int:
    """A number between 0 and 1 as a whole number of 2**-31."""
    return round(fraction * (1 << SHARE_BITS))


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A share below 1 for each row, int64: output number `position` of SplitMix64 from `seed`.

    Signed arithmetic wraps like the unsigned original; shifts are made logical by a mask.
    """
    mixed = seed + (position + 1) * _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(0x94D049BB133111EB)
    return _shift(mixed ^ _shift(mixed, 31), 64 - SHARE_BITS)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits: Tensor, params: DrawParams, share: Tensor, filters: Filters) -> Tensor:
    """Tokens [rows] int64 for `logits` [rows, vocabulary] float32 and uniforms `share` [rows].

    Both ways give the same token. The short one has to look whether it was enough, which on a GPU
    would wait for the device.
    """
    selective = filters.top_k or filters.top_p
    if not selective or logits.device.type != "cpu" or logits.shape[-1] <= LARGEST:
        return draw_among_all(logits, params, share, filters)
    tokens, covered = draw_among_largest(logits, params, share, filters)
    if not covered.all():
        rest = (~covered).nonzero()[:, 0]
        tokens[rest] = draw_among_all(logits[rest], params.select(rest), share[rest], filters)
    return tokens


def draw_among_all(logits: Tensor, params: DrawParams, share: Tensor, filters: Filters) -> Tensor:
    """Tokens [rows], by passes over the whole vocabulary."""
    tokens = torch.empty_like(share)
    for rows in _blocks(logits):
        tokens[rows] = _draw_block(logits[rows], params.select(rows), share[rows], filters)
    return tokens


def _blocks(logits: Tensor) -> list[slice]:
    """Rows whose temporaries are small enough to stay in a CPU's cache, or a GPU's memory."""
    elements = BLOCK if logits.device.type == "cpu" else DEVICE_BLOCK
    step = max(1, elements // logits.shape[-1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _draw_block(logits: Tensor, params: DrawParams, share: Tensor, filters: Filters) -> Tensor:
    scaled = scale(logits, params.temperature)
    weights = weigh(scaled)
    if filters.top_k:
        weights = _keep(scaled, weights, torch.ones_like(weights), params.top_k)
    if filters.top_p:
        weights = _keep(scaled, weights, weights, _part(weights.sum(-1), params.top_p))
    if filters.min_p:
        weights = torch.where(weights < _least(params.min_p), 0, weights)
    return _pick(weights, share)


def draw_among_largest(
    logits: Tensor, params: DrawParams, share: Tensor, filters: Filters
) -> tuple[Tensor, Tensor]:
    """Tokens [rows] found among the `LARGEST` largest logits, and which rows [rows] bool that
    covers; the tokens of the others mean nothing.

    A row is covered when all that its filters keep is there: the smallest candidate is below the
    last one kept, so no tie is missed. top_k or top_p must be on.
    """
    values, ids = logits.topk(LARGEST)
    scaled = scale(values, params.temperature)
    weights = weigh(scaled)
    covered = torch.ones_like(share, dtype=torch.bool)
    if filters.top_k:
        edge = scaled.gather(1, (params.top_k[:, None] - 1).clamp_(max=LARGEST - 1))
        weights = torch.where(scaled < edge, 0, weights)
        covered &= scaled[:, -1] < edge[:, 0]
        total = weights.sum(-1)
    else:
        total = _mass(logits, params.temperature)
    if filters.top_p:
        before = weights.cumsum(-1) < _part(total, params.top_p)[:, None]
        edge = scaled.gather(1, before.sum(-1, keepdim=True).clamp_(max=LARGEST - 1))
        weights = torch.where(scaled < edge, 0, weights)
        covered &= scaled[:, -1] < edge[:, 0]
    if filters.min_p:
        weights = torch.where(weights < _least(params.min_p), 0, weights)
    ids, order = ids.sort()
    index = _pick(weights.gather(1, order), share)
    return ids.gather(1, index[:, None])[:, 0], covered


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits over temperature with their maximum at 0; NaN where nothing but -inf is left."""
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature[:, None])


def weigh(scaled: Tensor) -> Tensor:
    """Probabilities as whole numbers, int64, `WEIGHT_ONE` for a scaled logit of 0."""
    return scaled.exp().mul_(WEIGHT_ONE).long()


def _mass(logits: Tensor, temperature: Tensor) -> Tensor:
    """Sum [rows] of all weights."""
    mass = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for rows in _blocks(logits):
        mass[rows] = weigh(scale(logits[rows], temperature[rows])).sum(-1)
    return mass


def _least(min_p: Tensor) -> Tensor:
    """The smallest weight [rows, 1] that min_p keeps."""
    return _part(torch.full_like(min_p, WEIGHT_ONE), min_p)[:, None]


def _part(total: Tensor, share: Tensor) -> Tensor:
    """`total * share / 2**31`, rounded down, exact: the product itself would overflow."""
    high, low = total >> 32, total & ((1 << 32) - 1)
    return ((high * share) << 1) + ((low * share) >> SHARE_BITS)


def _keep(scaled: Tensor, weights: Tensor, measure: Tensor, need: Tensor) -> Tensor:
    """`weights` of the most probable tokens whose `measure` sums to `need` [rows], else 0."""
    key = scaled.view(torch.int32) & 0x7FFFFFFF  # without the sign: ascending as `scaled` descends
    return torch.where(key > _reach(key, measure, need[:, None]), 0, weights)


def _reach(key: Tensor, measure: Tensor, need: Tensor) -> Tensor:
    """The smallest key [rows, 1] up to which `measure` sums to `need` or more.

    A radix select: the sums by the leading digit say in which bucket the edge lies, then by the
    next digit within that bucket. No sort, and nothing that depends on the order of a tie.

    key [rows, vocabulary] int32, not negative; measure [rows, vocabulary] int64; need [rows, 1].
    """
    edge = torch.zeros_like(need, dtype=torch.int32)
    before = torch.zeros_like(need)  # what the buckets below the edge's sum to
    for shift, bits in DIGITS:
        leading, last = key >> shift, (1 << bits) - 1
        sums = measure.new_zeros(len(key), 1 << bits)
        sums.scatter_add_(1, (leading & last).long(), measure)
        sums = sums.cumsum(-1).add_(before)
        bucket = (sums < need).sum(-1, keepdim=True).clamp_(max=last)
        before = torch.where(bucket > 0, sums.gather(1, (bucket - 1).clamp_(min=0)), before)
        edge = (edge << bits) | bucket.int()
        if shift:
            measure = torch.where(leading == edge, measure, 0)
    return edge


def _pick(weights: Tensor, share: Tensor) -> Tensor:
    """Index [rows] at which the running sum of `weights` passes `share` of the whole.

    A weight of 0 is never picked.
    """
    sums = weights.cumsum(-1)
    mark = _part(sums[:, -1], share)[:, None]
    index = torch.searchsorted(sums, mark, right=True)[:, 0]
    return index.clamp_(max=weights.shape[-1] - 1)  # only a row of NaN gets that far
