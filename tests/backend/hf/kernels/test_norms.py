"""`TritonBlocks.norm` against float64. What it has not written is NaN."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.hf.models.blocks import Norm
from backend.hf.precision import PRECISIONS

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
EPSILON = 1e-5
MOST_ERROR = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}  # of each value


def norm_of(gain: Tensor, dtype: str) -> Any:
    module = import_module("backend.hf.models.triton_blocks")
    return module.TritonBlocks(PRECISIONS[dtype], DEVICE).norm(Norm(gain, EPSILON))


def random(dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(PRECISIONS[dtype].compute)


def expected(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * gain.double()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("width", [5, 48, 300, 1024, 4096])
def test_a_row_is_divided_by_its_root_mean_square(width: int, dtype: str) -> None:
    torch.manual_seed(width)
    gain = random(dtype, width)
    norm = norm_of(gain, dtype)
    for rows in (1, 3, 16, 40):
        x = random(dtype, rows, width)
        before = x.clone()
        torch.full_like(x, torch.nan)  # where the result will be made
        wanted = expected(before, gain)
        torch.testing.assert_close(
            norm(x).double(), wanted, rtol=MOST_ERROR[dtype], atol=MOST_ERROR[dtype]
        )
        assert torch.equal(x, before)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_small_and_large_rows_are_normed_alike(size: float) -> None:
    gain = random("bfloat16", 1024)
    norm = norm_of(gain, "bfloat16")
    x = random("bfloat16", 8, 1024) * size
    torch.testing.assert_close(norm(x).double(), expected(x, gain), rtol=5e-3, atol=5e-3)


def test_a_row_does_not_see_the_others() -> None:
    norm = norm_of(random("bfloat16", 1024), "bfloat16")
    x = random("bfloat16", 17, 1024)
    clean = norm(x)
    alone = torch.full_like(x, torch.nan)
    alone[5] = x[5]
    assert torch.equal(norm(alone)[5], clean[5])
