"""`fixed_product` against float64, and bit for bit against itself in other batches.

Memory around every operand is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@dataclass(frozen=True, slots=True)
class Case:
    """What the kernel is compiled for, and a width and depth of that kind."""

    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    columns: int = 384
    depth: int = 512
    biased: bool = False

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module = import_module("backend.hf.kernels.fixed_product")
        shape = len(x), len(weight)
        out = None
        if self.out_dtype is not None:
            out = torch.full(shape, torch.nan, device=DEVICE, dtype=self.out_dtype)
        product: Tensor = module.fixed_product(x, weight, bias, out)
        return product

    def add(self, y: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> None:
        import_module("backend.hf.kernels.fixed_product").fixed_product_add(y, weight, bias, total)

    def random(self, *shape: int) -> Tensor:
        """Numbers between two rows of NaN."""
        whole = torch.randn(shape[0] + 2, *shape[1:], device=DEVICE).to(self.dtype)
        whole[[0, -1]] = torch.nan
        return whole[1:-1]

    def operands(self, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
        torch.manual_seed(rows)
        x, weight = self.random(rows, self.depth), self.random(self.columns, self.depth)
        return x, weight, self.random(self.columns) if self.biased else None


CASES = {
    "bf16": Case(),
    "bf16, to fp32": Case(out_dtype=torch.float32),
    "bf16, bias": Case(biased=True),
    "fp16": Case(torch.float16),
    "fp32, bias": Case(torch.float32, biased=True),
    "bf16, ragged": Case(columns=200, depth=144, biased=True),
    "bf16, odd": Case(columns=97, depth=53, biased=True),
    "fp32, odd": Case(torch.float32, columns=33, depth=21),
}


def assert_near(got: Tensor, right: Tensor, size: Tensor) -> None:
    """`right` [rows, columns] float64; `size`: sums of what was added up, by their absolute."""
    rounding = torch.finfo(got.dtype).eps * right.abs() if got.dtype != torch.float32 else 0
    assert ((got.double() - right).abs() <= rounding + 2**-18 * size).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 65, 300])
def test_products_are_those_of_float64(name: str, rows: int) -> None:
    case = CASES[name]
    x, weight, bias = case.operands(rows)
    right = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        right, size = right + bias.double(), size + bias.double().abs()
    got = case.product(x, weight, bias)
    assert got.dtype == (case.out_dtype or case.dtype)
    assert_near(got, right, size)
    memory = torch.full((rows + 2, case.columns), torch.nan, dtype=case.dtype, device=DEVICE)
    total = memory[1:-1]
    total.copy_(torch.randn(total.shape, device=DEVICE) * 10)
    right, size = right + total.double(), size + total.double().abs()
    case.add(x, weight, bias, total)
    assert_near(total, right, size)
    assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_a_row_has_the_same_bits_in_every_batch(name: str) -> None:
    case = CASES[name]
    x, weight, bias = case.operands(300)
    total = torch.randn(300, case.columns, device=DEVICE).to(case.dtype)
    products, sums = case.product(x, weight, bias), total.clone()
    case.add(x, weight, bias, sums)
    for count in (1, 1, 3, 64, 300):
        chosen = torch.randperm(300, device=DEVICE)[:count]
        assert torch.equal(case.product(x[chosen], weight, bias), products[chosen])
        some = total[chosen]
        case.add(x[chosen], weight, bias, some)
        assert torch.equal(some, sums[chosen])
