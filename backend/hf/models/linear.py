"""Matrix products with weights that are laid out once, at load, for the kernel that reads them.

Prepacking is the largest single gain on a CPU: oneDNN's and FBGEMM's own layouts spare a reorder at
every call. Both are reached through operators that torch keeps private, so each is tried at start
and the plain product stands in for it where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.hf.precision import Precision

PACKED_FOR_ROWS = 32  # rows that oneDNN lays a weight out for; other counts run on the same layout


class Linear(Protocol):
    """x [rows, in] -> x @ weight.T + bias, [rows, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class PlainLinear:
    """The product of torch itself: on a GPU cuBLAS."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class OneDnnLinear:
    """oneDNN with a packed weight, float32 or bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return result


class HalfWeightLinear:
    """FBGEMM with a packed float16 weight and float32 arithmetic. `weight` comes in float32.

    FBGEMM pads `in` to a multiple of 512 in memory; the padding is not read.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return result


def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product exists here and takes `dtype`."""
    probe = torch.ones(16, 16, dtype=dtype)
    try:
        OneDnnLinear(probe, None)(probe)
    except (AttributeError, RuntimeError):
        return False
    return True


def linear_kind(precision: Precision, device: str) -> Callable[[Tensor, Tensor | None], Linear]:
    """Which product is the fastest there; takes a weight [out, in] and a bias in the compute dtype,
    on the device.
    """
    if device != "cpu":
        return PlainLinear
    if precision.weights != precision.compute:
        return HalfWeightLinear
    return OneDnnLinear if onednn_packs(precision.weights) else PlainLinear
