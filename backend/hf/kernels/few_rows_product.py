"""Products of a few rows: norm in front, the weight streamed once, and what follows the sums.

Floor: the weight's bytes over the read rate, whatever the rows; on an H200 at Qwen3-0.6B 1.8 us
(query, key and value), 0.9 (output), 2.7 (gate and up), 1.4 (down) and 68 (head). Reference:
`tests/backend/hf/kernels/test_products.py`.

A warp has a stretch of `in`, and a lane loads the 16 bytes that it holds as an operand of tensor
cores (mma.m16n8k16): weights go from memory to products without shared memory. For that both
operands take each 32 columns in another order, which a sum does not see. A program asks for its
weights, which nothing writes, before it waits for the launch ahead of it (programmatic dependent
launch): memory does not idle between products. The norm's scale is one number a row and applied to
the sums; x * gain is rounded to the dtype before it.
"""

# mypy: disable-error-code="assignment, var-annotated"
# tuples grow in a kernel

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from backend.hf.models.blocks import Norm

MOST_ROWS = 16
CHUNK = 32  # columns that 4 lanes load, 16 bytes each; literal in kernels
# lines of a program, where the weight has so many at least: measured, as are warps and chunks
LINES = ((16, 4096), (8, 0))
WARPS, MOST_CHUNKS = 4, 8
MOST_LOADS = 16  # of 16 bytes, that a lane has on their way


@dataclass(frozen=True, slots=True)
class Cut:
    """What a program takes: so many `lines` of the weight, 8 or a multiple of 16.

    warps: each has a stretch of `in`; chunks: of 32 columns, a warp's share of one step along it;
    ahead: steps whose weights are on their way.
    """

    lines: int
    warps: int
    chunks: int
    ahead: int


@triton.jit
def _line(LINES: tl.constexpr):
    """Number of each line of a tile: [8, 1, LINES // 8, 1, 1]."""
    eight = tl.arange(0, LINES // 8)[None, None, :, None, None]
    return eight * 8 + tl.arange(0, 8)[:, None, None, None, None]


@triton.jit
def _load(
    matrix, line, FIRST: tl.constexpr, COUNT: tl.constexpr,
    IN: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Tiles [8, WARPS, lines // 8, CHUNKS, 32] of COUNT steps along lines of `matrix` [, IN].

    0 past a line's end; no tiles past the last step.
    """
    STEP: tl.constexpr = WARPS * CHUNKS * 32
    warp = tl.arange(0, WARPS)[None, :, None, None, None]
    chunk = tl.arange(0, CHUNKS)[None, None, None, :, None]
    tiles = ()
    for step in tl.static_range(FIRST, min(FIRST + COUNT, (IN + STEP - 1) // STEP)):
        column = ((step * WARPS + warp) * CHUNKS + chunk) * 32 + tl.arange(0, 32)
        place = matrix + line * IN + column
        if IN % STEP == 0:
            tiles = tiles + (tl.load(place),)  # noqa: RUF005 - no unpacking in a kernel
        else:
            tiles = tiles + (tl.load(place, mask=column < IN, other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def _fragment(tile):
    """tile [8, warps, lines // 8, chunks, 32] -> [warps, lines, chunks * 32], columns reordered.

    A lane's 8 elements of a chunk become its parts of two products of depth 16: no data moves.
    """
    parts = tile.reshape(8, tile.shape[1], tile.shape[2], tile.shape[3], 4, 2, 2, 2)
    parts = parts.permute(1, 2, 0, 3, 5, 6, 4, 7)
    return parts.reshape(tile.shape[1], tile.shape[2] * 8, tile.shape[3] * 32)


@triton.jit
def _sum_up(
    x, row, gain, weight, line, tiles, gains,
    IN: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
    WARPS: tl.constexpr, CHUNKS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """x * gain times the weight, [ROWS, LINES]; and the sum of x * x, [ROWS, 1].

    `tiles` and `gains` are those of the first AHEAD steps.
    """
    xs = _load(x, row, 0, AHEAD, IN, WARPS, CHUNKS)
    tl.debug_barrier()  # else the compiler puts loads off until registers are free, one by one
    squares = tl.zeros([8, WARPS, ROWS // 8, CHUNKS, 32], tl.float32)
    sums = tl.zeros([WARPS, 16, LINES], tl.float32)
    for step in tl.static_range((IN + WARPS * CHUNKS * 32 - 1) // (WARPS * CHUNKS * 32)):
        tiles = tiles + _load(weight, line, step + AHEAD, 1, IN, WARPS, CHUNKS)
        xs = xs + _load(x, row, step + AHEAD, 1, IN, WARPS, CHUNKS)
        values = xs[step]
        if gain is not None:
            gains = gains + _load(gain, _line(8) * 0, step + AHEAD, 1, IN, WARPS, CHUNKS)
            wide = values.to(tl.float32)
            squares += wide * wide
            values = values * gains[step]
        both = values.broadcast_to(8, WARPS, 2, CHUNKS, 32)  # 16 rows: the smallest left side
        sums = tl.dot(_fragment(both), _fragment(tiles[step]).permute(0, 2, 1), sums)
    if ROWS == 8:
        sums, _ = tl.split(sums.reshape(WARPS, 2, 8, LINES).permute(0, 2, 3, 1))
    total = tl.sum(tl.sum(tl.sum(squares, 4), 3), 1)  # [8, ROWS // 8]
    return tl.sum(sums, 0), total.permute(1, 0).reshape(ROWS, 1)


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x,  # [rows, IN]
    gain,  # [IN], weight of the norm; or None: x is taken as it is
    weight,  # [OUT, IN]
    bias,  # [OUT] or None
    output,  # [rows, OUT]; of GATED [rows, OUT // 2]
    rows, epsilon,
    IN: tl.constexpr, OUT: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """LINES lines of the weight with all rows, ROWS or fewer. Grid [OUT / LINES]."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    UNITS: tl.constexpr = OUT // 2 if GATED else OUT  # outputs of a row
    GROUP: tl.constexpr = LINES // 2 if GATED else LINES  # and of the program: half gate, half up
    first = tl.program_id(0).to(tl.int64) * GROUP
    # lines and rows past the end are the last ones again, and not stored
    line = first + _line(LINES) % GROUP + _line(LINES) // GROUP * UNITS
    line = tl.minimum(line, OUT - 1)
    row = tl.minimum(_line(ROWS), rows - 1)
    tiles = _load(weight, line, 0, AHEAD, IN, WARPS, CHUNKS)
    gains = ()
    if gain is not None:
        gains = _load(gain, _line(8) * 0, 0, AHEAD, IN, WARPS, CHUNKS)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    unit = (first + tl.arange(0, GROUP))[None, :]
    r = tl.arange(0, ROWS)[:, None]
    place = output + r * UNITS + unit
    stored = (unit < UNITS) & (r < rows)
    if ADDED:
        before = tl.load(place, mask=stored, other=0.0)
    result, squares = _sum_up(
        x, row, gain, weight, line, tiles, gains, IN, ROWS, LINES, WARPS, CHUNKS, AHEAD
    )
    if gain is not None:
        result *= tl.rsqrt(squares / IN + epsilon)
    if bias is not None:
        at = first + tl.arange(0, LINES) % GROUP + tl.arange(0, LINES) // GROUP * UNITS
        result += tl.load(bias + at, mask=at < OUT, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(result.reshape(ROWS, 2, GROUP).permute(0, 2, 1))
        result = gate * tl.sigmoid(gate) * up
    if ADDED:
        result += before.to(tl.float32)
    tl.store(place, result.to(output.dtype.element_ty), mask=stored)


class FewRowsProduct:
    """One weight [out, in] of bfloat16, multiplied with 1 to MOST_ROWS rows a call.

    `norm`: of the rows, before the product; `gated`: the output is silu(gate) * up, the halves of
    the product; `added`: the product is added to what the output holds; `dependent`: the chip
    starts a launch before the one ahead of it has ended. Summed up in float32 and rounded once. All
    tensors are contiguous.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        gated: bool = False,
        added: bool = False,
        dependent: bool = False,
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._gain = None if norm is None else norm.weight
        self._epsilon = 0.0 if norm is None else norm.epsilon
        self._gated = gated
        self._added = added
        self._dependent = dependent
        self._lines, self._width = weight.shape
        self.cut = cut_weight(self._lines, self._width)

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        """x [rows, in] -> `output` [rows, out], gated [rows, out / 2]; of any dtype."""
        cut, lines, rows = self.cut, self._lines, len(x)
        few_rows_kernel[(-(-lines // cut.lines),)](
            x, self._gain, self._weight, self._bias, output, rows, self._epsilon,
            self._width, lines, self._gated, self._added,
            MOST_ROWS if rows > MOST_ROWS // 2 else MOST_ROWS // 2,
            cut.lines, cut.warps, cut.chunks, cut.ahead, self._dependent,
            num_warps=cut.warps, launch_pdl=self._dependent,
        )  # fmt: skip
        return output


def cut_weight(lines: int, width: int) -> Cut:
    """The cut of a weight [lines, width]."""
    chunks = min(1 << (-(-width // (WARPS * CHUNK)) - 1).bit_length(), MOST_CHUNKS)
    taken = next(taken for taken, least in LINES if lines >= least)
    ahead = max(MOST_LOADS * 8 // (taken * chunks), 1)
    return Cut(taken, WARPS, chunks, ahead)
