"""Logarithm of the sum of exponentials of each row, in one order whatever the number of rows.

Reads every logit once: rows * vocabulary * 4 bytes, at 256 rows of 151,936 34 us on an H200. One
program a row: a row alone takes some 10 us. Reference: `tests/backend/hf/kernels/test_log_sum.py`.
Maximum and sum in one pass: Milakov and Gimelshein 2018.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LANES = 1024  # sums of a row that run beside each other
DEPTH = 4  # logits that a lane takes at a time
STAGES = 3  # of loads ahead
WARPS = 8


# neither the place of the first row nor their number may choose between compiled kernels
@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["logits"])
def log_sum_kernel(
    logits,  # [rows, vocabulary] float32, `stride` from row to row
    output,  # [rows]
    stride, vocabulary,
    LANES: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid [rows]."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)  # in units of exp(peak)
    for first in tl.range(0, vocabulary, DEPTH * LANES, num_stages=STAGES):
        place = logits + row * stride + first + token
        values = tl.load(place, mask=first + token < vocabulary, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(values, 0))
        base = _finite(higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(values - base[None, :]), 0)
        peak = higher
    base = _finite(tl.max(peak, 0))
    whole = tl.sum(total * tl.exp(peak - base), 0)
    tl.store(output + row, base + tl.log(whole))


@triton.jit
def _finite(peak):
    """What exponents are counted from: 0 at an infinite `peak`, as inf - inf is no number."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


def log_sum_exp(logits: Tensor) -> Tensor:
    """logits [rows, vocabulary] float32, each row contiguous -> [rows, 1] float32."""
    output = logits.new_empty(len(logits), 1)
    log_sum_kernel[(len(logits),)](
        logits, output, logits.stride(0), logits.shape[1], LANES, DEPTH, STAGES, num_warps=WARPS
    )
    return output
