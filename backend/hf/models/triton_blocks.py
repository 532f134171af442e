"""The pieces of a decoder layer by our kernels and cuBLAS: CUDA.

Up to 16 rows a piece is one launch, bound by the bytes of its weight; above, cuBLAS multiplies and
kernels norm and gate. Imported only where a CUDA device was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.hf.kernels.chip import hopper_or_later
from backend.hf.kernels.few_rows_product import FewRowsProduct
from backend.hf.kernels.fixed_product import fixed_product, fixed_product_add
from backend.hf.kernels.rms_norm import rms_norm
from backend.hf.kernels.silu_multiply import silu_multiply
from backend.hf.kernels.turn_heads import HeadTurner, PositionTable
from backend.hf.models.blocks import (
    AddedProduct,
    GatedProduct,
    Head,
    HeadLayout,
    Norm,
    NormedProduct,
    RowNorm,
    TurnHeads,
    TurnPositions,
)
from backend.hf.models.rope import Rotary
from backend.hf.precision import Precision


@dataclass(frozen=True, slots=True)
class FewRows:
    """The most rows that each product takes by our kernel; 0: none."""

    normed: int = 0
    gated: int = 0
    added: int = 0
    head: int = 0


# float32 has no tensor cores, and a row times the norm's weight may leave the range of float16
FEW_ROWS: dict[torch.dtype, FewRows] = {
    torch.bfloat16: FewRows(normed=16, gated=16, added=16, head=16),
    torch.float16: FewRows(),
    torch.float32: FewRows(),
}


@dataclass(frozen=True, slots=True)
class ManyRows:
    """The products of more rows."""

    product: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]  # x, weight, bias, out
    add: Callable[[Tensor, Tensor, Tensor | None, Tensor], None]  # y, weight, bias, total
    scores: Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def _add(y: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> None:
    if bias is not None:
        total += bias
    total.addmm_(y, weight.T)  # what is there is summed up in float32 with the product


def _scores(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=out)
    return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)


def _fixed_scores(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return fixed_product(hidden, weight, out=out)


LIBRARY = ManyRows(_product, _add, _scores)
FIXED = ManyRows(fixed_product, fixed_product_add, _fixed_scores)


class TritonBlocks:
    """`Blocks` on a CUDA device. All tensors that pieces take are contiguous."""

    def __init__(self, precision: Precision, device: str, deterministic: bool = False) -> None:
        """`deterministic`: the bits of a row depend on nothing but that row."""
        self._precision = precision
        self._device = device
        self._dependent = hopper_or_later(device)
        self._few, self._many = FEW_ROWS[precision.compute], LIBRARY
        if deterministic:
            self._few, self._many = FewRows(), FIXED
        self.parameters = 0
        self.weight_bytes = 0

    def norm(self, norm: Norm) -> RowNorm:
        norm = self._placed(norm)
        return lambda x: rms_norm(x, norm, self._dependent)

    def normed_product(self, norm: Norm, weight: Tensor, bias: Tensor | None) -> NormedProduct:
        norm, (weight, bias) = self._placed(norm), self._weights(weight, bias)
        few = FewRowsProduct(weight, bias, norm, dependent=self._dependent)

        def product(x: Tensor, out: Tensor) -> None:
            if len(x) > self._few.normed:
                self._many.product(rms_norm(x, norm, self._dependent), weight, bias, out)
            else:
                few(x, out)

        return product

    def gated_product(self, norm: Norm, weight: Tensor, bias: Tensor | None) -> GatedProduct:
        norm, (weight, bias) = self._placed(norm), self._weights(weight, bias)
        few = FewRowsProduct(weight, bias, norm, gated=True, dependent=self._dependent)

        def product(x: Tensor) -> Tensor:
            if len(x) > self._few.gated:
                both = x.new_empty(len(x), len(weight))
                self._many.product(rms_norm(x, norm, self._dependent), weight, bias, both)
                return silu_multiply(both, self._dependent)
            return few(x, x.new_empty(len(x), len(weight) // 2))

        return product

    def added_product(self, weight: Tensor, bias: Tensor | None) -> AddedProduct:
        weight, bias = self._weights(weight, bias)
        few = FewRowsProduct(weight, bias, added=True, dependent=self._dependent)

        def add(y: Tensor, total: Tensor) -> None:
            if len(y) > self._few.added:
                self._many.add(y, weight, bias, total)
            else:
                few(y, total)

        return add

    def head(self, weight: Tensor) -> Head:
        weight, _ = self._weights(weight, None)
        few = FewRowsProduct(weight, dependent=self._dependent)

        def scores(hidden: Tensor, out: Tensor | None = None) -> Tensor:
            if out is None:
                out = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
            if len(hidden) > self._few.head:
                return self._many.scores(hidden, weight, out)
            return few(hidden, out)

        return scores

    def turn_heads(self, layout: HeadLayout) -> TurnHeads:
        return HeadTurner(layout, self._precision.compute, self._device)

    def turn_positions(self, rotary: Rotary, context: int) -> TurnPositions:
        return PositionTable(rotary, context, self._device)

    def _weights(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.parameters += weight.numel()
        self.weight_bytes += weight.numel() * self._precision.weights.itemsize
        if bias is not None:
            bias = bias.to(self._device, self._precision.compute)
        return weight.to(self._device, self._precision.compute).contiguous(), bias

    def _placed(self, norm: Norm) -> Norm:
        return Norm(norm.weight.to(self._device, self._precision.compute), norm.epsilon)
