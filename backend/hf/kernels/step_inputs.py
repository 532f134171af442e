"""What a step of decodes reads of its slots, in one launch.

Moves seven numbers a row: two loads that wait for each other, launch-bound at any row count.
Reference: `tests/backend/hf/kernels/test_step_inputs.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # rows of a program


@triton.jit(
    do_not_specialize=["rows", "table_stride"],
    do_not_specialize_on_alignment=["slots", "positions"],
)
def step_inputs_kernel(
    slots,  # [rows]
    positions,  # [rows]
    last_token,  # [slots]
    table,  # [slots, max_pages]
    token_ids,  # [rows], and
    write_at,  # the like, and
    lengths,  # the like: what is made
    rows, table_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [blocks of rows]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    slot = tl.load(slots + row, mask=there, other=0).to(tl.int64)
    position = tl.load(positions + row, mask=there, other=0)
    token = tl.load(last_token + slot, mask=there, other=0)
    page = tl.load(table + slot * table_stride + position // PAGE, mask=there, other=0)
    tl.store(token_ids + row, token, mask=there)
    tl.store(write_at + row, page * PAGE + position % PAGE, mask=there)
    tl.store(lengths + row, position + 1, mask=there)


def step_inputs(
    slots: Tensor, positions: Tensor, last_token: Tensor, table: Tensor, page_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, write_at and lengths, [rows] int64 each, of rows in `slots` [rows] at `positions`
    [rows]: the token that each slot drew last (`last_token` [slots]), the row of the KV pool, and
    the positions attended to.

    table [slots, max_pages]: page ids. All are int64, and contiguous but for the table's rows.
    """
    rows = len(slots)
    # each its own allocation: kernels compile anew for a pointer that is aligned differently
    token_ids, write_at, lengths = (torch.empty_like(positions) for _ in range(3))
    step_inputs_kernel[(-(-rows // BLOCK),)](
        slots, positions, last_token, table, token_ids, write_at, lengths,
        rows, table.stride(0), page_tokens, BLOCK,
    )  # fmt: skip
    return token_ids, write_at, lengths
