"""Rows of logits copied, and what their masks do not allow forbidden, one launch.

Reads and writes rows * vocabulary * 8 bytes: 1.2 MB for a row of 151,936 logits, launch-bound; for
32 rows 39 MB, about 10 us on an H200. Reference: `tests/backend/hf/test_sampling_masks.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits, a program
WARPS = 8


@triton.jit(do_not_specialize=["masked"], do_not_specialize_on_alignment=["rows"])
def mask_rows_kernel(
    logits,  # [all rows, vocabulary] float32
    rows,  # [copied] int64
    masks,  # [masked, words] int32: token i is bit i % 32 of word i // 32
    copies,  # [copied, vocabulary] float32
    masked, row_stride, vocabulary, words, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [BLOCKs of the vocabulary, copied]; the first `masked` of the copies have a mask."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < vocabulary
    value = tl.load(logits + tl.load(rows + row) * row_stride + token, mask=there)
    word = tl.load(masks + row * words + (token >> 5), mask=there & (row < masked), other=-1)
    allowed = ((word >> (token & 31)) & 1) != 0
    tl.store(copies + row * vocabulary + token, tl.where(allowed, value, float("-inf")), mask=there)


def mask_rows(logits: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
    """Copies [rows, vocabulary] of `rows` of `logits`, the first of them bound by `masks`."""
    vocabulary = logits.shape[1]
    copies = logits.new_empty(len(rows), vocabulary)
    mask_rows_kernel[-(-vocabulary // BLOCK), len(rows)](
        logits, rows, masks, copies, len(masks), logits.stride(0), vocabulary, masks.shape[1],
        BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return copies
