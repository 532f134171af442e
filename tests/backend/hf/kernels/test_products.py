"""The products of `TritonBlocks` against float64, on both sides of every limit of rows.

Operands are rounded to the dtype first, so what is bounded is the products' own error, in units of
the result's spread. What a product has not written is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backend.hf.models.blocks import Norm
from backend.hf.precision import PRECISIONS

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ROWS = (1, 2, 3, 8, 16, 17, 40)
EPSILON = 1e-6
MOST_ERROR = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}

# width, outputs, whether there is a bias; the last ones are Qwen3-0.6B's
NORMED = [(48, 70, True), (300, 102, False), (4096, 1040, True), (1024, 4096, False)]
GATED = [(48, 70, True), (300, 102, False), (1024, 6144, False)]
ADDED = [(35, 48, True), (300, 102, False), (2048, 1024, False), (3072, 1024, False)]
HEADS = [(48, 301), (1024, 151936)]


def blocks(dtype: str) -> Any:
    return import_module("backend.hf.models.triton_blocks").TritonBlocks(PRECISIONS[dtype], DEVICE)


def random(dtype: str, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(PRECISIONS[dtype].compute)


def weights(dtype: str, width: int, outputs: int, biased: bool) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(width)
    weight = random(dtype, outputs, width, scale=width**-0.5)
    return weight, random(dtype, outputs) if biased else None


def spoil(*shape: int, dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that the next tensor of this size is made in."""
    torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def normed(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return wide * scale * gain.double()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def check(result: Tensor, expected: Tensor, dtype: str) -> None:
    error = (result.double() - expected).abs()
    allowed = MOST_ERROR[dtype] * (expected.abs() + expected.std())
    assert result.shape == expected.shape
    assert bool((error <= allowed).all()), (
        f"{(error / allowed).max().item():.1f} of what is allowed"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(("width", "outputs", "biased"), NORMED)
def test_rows_are_normed_and_multiplied(width: int, outputs: int, biased: bool, dtype: str) -> None:
    weight, bias = weights(dtype, width, outputs, biased)
    gain = random(dtype, width)
    piece = blocks(dtype).normed_product(Norm(gain, EPSILON), weight, bias)
    for rows in ROWS:
        x = random(dtype, rows, width, scale=3.0)
        before = x.clone()
        out = torch.full((rows, outputs), torch.nan, dtype=x.dtype, device=DEVICE)
        piece(x, out)
        check(out, product(normed(x, gain), weight, bias), dtype)
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(("width", "outputs", "biased"), GATED)
def test_the_gate_opens_for_its_own_output(
    width: int, outputs: int, biased: bool, dtype: str
) -> None:
    weight, bias = weights(dtype, width, outputs, biased)
    gain = random(dtype, width)
    piece = blocks(dtype).gated_product(Norm(gain, EPSILON), weight, bias)
    for rows in ROWS:
        x = random(dtype, rows, width, scale=0.3)
        before = x.clone()
        spoil(rows, outputs // 2, dtype=x.dtype)
        check(piece(x), gated(product(normed(x, gain), weight, bias)), dtype)
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(("width", "outputs", "biased"), ADDED)
def test_a_product_is_added_to_its_rows_and_to_no_other(
    width: int, outputs: int, biased: bool, dtype: str
) -> None:
    weight, bias = weights(dtype, width, outputs, biased)
    piece = blocks(dtype).added_product(weight, bias)
    for rows in ROWS:
        y = random(dtype, rows, width)
        whole = random(dtype, rows + 2, outputs)
        before, y_before = whole.clone(), y.clone()
        piece(y, whole[1:-1])
        check(whole[1:-1], product(y, weight, bias) + before[1:-1].double(), dtype)
        assert torch.equal(whole[[0, -1]], before[[0, -1]])
        assert torch.equal(y, y_before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(("width", "outputs"), HEADS)
def test_scores_are_float32_and_stand_where_they_were_wanted(
    width: int, outputs: int, dtype: str
) -> None:
    weight, _ = weights(dtype, width, outputs, False)
    piece = blocks(dtype).head(weight)
    for rows in ROWS:
        hidden = random(dtype, rows, width)
        whole = torch.full((rows + 2, outputs), torch.nan, device=DEVICE)
        expected = product(hidden, weight, None)
        result = piece(hidden, whole[1:-1])
        assert result.data_ptr() == whole[1:-1].data_ptr()
        assert result.dtype == torch.float32
        check(result, expected, "float32")
        assert bool(whole[[0, -1]].isnan().all())
        check(piece(hidden), expected, "float32")


@pytest.mark.parametrize("rows", [3, 8, 16, 17])
def test_a_row_does_not_see_the_others(rows: int) -> None:
    dtype, width = "bfloat16", 1024
    gain = random(dtype, width)
    weight, _ = weights(dtype, width, 4096, False)
    norm = Norm(gain, EPSILON)
    for piece in (
        into(torch.nan, blocks(dtype).normed_product(norm, weight, None), 4096),
        blocks(dtype).gated_product(norm, weight, None),
        blocks(dtype).head(weight),
        into(0.0, blocks(dtype).added_product(weight, None), 4096),
    ):
        x = random(dtype, rows, width)
        clean = piece(x)
        for row in (0, rows // 2, rows - 1):
            alone = torch.full_like(x, torch.nan)
            alone[row] = x[row]
            assert torch.equal(piece(alone)[row], clean[row])


def into(
    value: float, put: Callable[[Tensor, Tensor], None], outputs: int
) -> Callable[[Tensor], Tensor]:
    """`put` into rows of `value`."""

    def apply(x: Tensor) -> Tensor:
        out = x.new_full((len(x), outputs), value)
        put(x, out)
        return out

    return apply


# cuBLAS may choose otherwise in a graph
@pytest.mark.parametrize(("rows", "most_error"), [(1, 0.0), (12, 0.0), (24, 0.03)])
def test_launches_that_overlap_compute_what_launches_one_by_one_compute(
    rows: int, most_error: float
) -> None:
    """Six layers of products in one graph, replayed with other inputs each time."""
    made, width = blocks("bfloat16"), 1024
    layers = []
    for layer in range(6):
        torch.manual_seed(layer)
        norm = Norm(random("bfloat16", width), EPSILON)
        gate_up = random("bfloat16", 6144, width, scale=0.02)
        down = random("bfloat16", width, 3072, scale=0.02)
        output = random("bfloat16", width, width, scale=0.02)
        query = random("bfloat16", width, width, scale=0.02)
        layers.append(
            (
                into(torch.nan, made.normed_product(norm, query, None), width),
                made.added_product(output, None),
                made.gated_product(norm, gate_up, None),
                made.added_product(down, None),
            )
        )

    def run(x: Tensor, between: Callable[[], None]) -> None:
        for first, add, gate, add_down in layers:
            for make, put in ((first, add), (gate, add_down)):
                y = make(x)
                between()
                put(y, x)
                between()

    x = random("bfloat16", rows, width)
    run(x, torch.cuda.synchronize)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x, lambda: None)
    for _ in range(20):
        start = random("bfloat16", rows, width)
        expected = start.clone()
        run(expected, torch.cuda.synchronize)
        x.copy_(start)
        graph.replay()
        torch.testing.assert_close(x, expected, rtol=most_error, atol=most_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 3072), (17, 35), (40, 1100)])
def test_silu_of_the_first_half_times_the_second(rows: int, width: int, dtype: torch.dtype) -> None:
    module = import_module("backend.hf.kernels.silu_multiply")
    x = torch.randn(rows, 2 * width, device=DEVICE).to(dtype)
    spoil(rows, width, dtype=dtype)
    result = module.silu_multiply(x, False)
    check(result, gated(x.double()), str(dtype).removeprefix("torch."))


def test_a_table_that_is_there_already_is_shared_and_weights_are_counted() -> None:
    made = blocks("bfloat16")
    table = random("bfloat16", 4096, 1024)
    before = torch.cuda.memory_allocated()
    made.head(table)
    assert torch.cuda.memory_allocated() == before
    made.added_product(torch.randn(64, 32), torch.randn(64))
    assert made.parameters == 4096 * 1024 + 64 * 32
    assert made.weight_bytes == 2 * made.parameters
