"""Matrix products whose rows do not know of each other: the products of DETERMINISTIC=1.

One tile for every row count, `in` summed up in one order by one program: a row has the same bits
alone, in any batch and at any place of it. What that costs is speed at few rows, where a library
would split `in` over programs. Floor: the weight's bytes over the read rate at few rows, 2 * rows *
out * in operations at many; 65 us for 4,096 rows of 6144 x 1024 in bf16 on an H200. Reference:
`tests/backend/hf/kernels/test_fixed_product.py`. Programs in groups of tile rows, so that the L2
cache holds what neighbours read: Tillet, the Triton tutorial on matrix multiplication.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """How the products of a dtype are cut: never by the number of rows, which would show in bits.

    rows, columns: of the result; depth: of one step along `in`; warps; stages of loads ahead.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


HALF_PRECISION = Tile(128, 128, 64, warps=8, stages=3)
TILES: dict[torch.dtype, Tile] = {
    torch.bfloat16: HALF_PRECISION,
    torch.float16: HALF_PRECISION,
    torch.float32: Tile(64, 64, 16, warps=4, stages=2),  # no tensor cores
}
GROUP = 8  # rows of tiles


# `rows` must not choose between compiled kernels: the same code for every count
@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x,  # [rows, depth]
    weight,  # [columns, depth]
    bias,  # [columns] or None
    output,  # [rows, columns]
    rows, columns, depth,
    ADD: tl.constexpr,  # to what `output` holds
    WHOLE: tl.constexpr,  # depth is a multiple of DEPTH
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of the result. Grid [tiles]."""
    tile = tl.program_id(0)
    across = tl.cdiv(columns, COLUMNS)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(rows, ROWS) - first, GROUP)
    inner = tile % (GROUP * across)
    row = (first + inner % height) * ROWS + tl.arange(0, ROWS)
    column = inner // height * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # rows and columns past the end read the last one, and are not stored
    real_row = tl.minimum(row, rows - 1).to(tl.int64)
    real_column = tl.minimum(column, columns - 1).to(tl.int64)
    left = x + (real_row * depth)[:, None] + k[None, :]
    right = weight + (real_column * depth)[None, :] + k[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, depth, DEPTH):
        if WHOLE:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=(k < depth - begin)[None, :], other=0.0)
            b = tl.load(right, mask=(k < depth - begin)[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        left += DEPTH
        right += DEPTH
    there = (row < rows)[:, None] & (column < columns)[None, :]
    if bias is not None:
        sums += tl.load(bias + real_column).to(tl.float32)[None, :]
    target = output + (row.to(tl.int64) * columns)[:, None] + column[None, :]
    if ADD:
        sums += tl.load(target, mask=there, other=0.0).to(tl.float32)
    tl.store(target, sums.to(output.dtype.element_ty), mask=there)


def fixed_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [rows, in] @ weight [out, in].T + bias [out]: [rows, out], of x's dtype or into `out`.

    Summed up in float32 and rounded once. All are contiguous; x and weight are of one dtype.
    """
    output = x.new_empty(len(x), len(weight)) if out is None else out
    _launch(x, weight, bias, output, add=False)
    return output


def fixed_product_add(y: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> None:
    """total [rows, out] += y [rows, in] @ weight [out, in].T + bias [out]; see `fixed_product`."""
    _launch(y, weight, bias, total, add=True)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, add: bool) -> None:
    rows, depth = x.shape
    columns = len(weight)
    tile = TILES[x.dtype]
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    product_kernel[(tiles,)](
        x, weight, bias, output, rows, columns, depth, add, depth % tile.depth == 0,
        tile.rows, tile.columns, tile.depth, GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
