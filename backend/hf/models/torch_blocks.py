"""The pieces of a decoder layer by torch's own operations: any device, and the reference of every
kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.hf.models.blocks import (
    AddedProduct,
    GatedProduct,
    Head,
    HeadLayout,
    Norm,
    NormedProduct,
    Rotation,
    RowNorm,
    TurnHeads,
    TurnPositions,
)
from backend.hf.models.linear import Linear, linear_kind
from backend.hf.models.rope import Rotary
from backend.hf.precision import Precision


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [rows, width], normed."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.epsilon)


def gate(x: Tensor) -> Tensor:
    """x [rows, width] -> silu(gate) * up, its halves: [rows, width / 2]."""
    gates, ups = x.chunk(2, dim=-1)
    return F.silu(gates).mul_(ups)


@dataclass(frozen=True, slots=True)
class Between:
    """What is computed between the products: `compiled_blocks.py` brings functions of its own."""

    norm: Callable[[Tensor, Norm], Tensor]  # as `rms_norm`
    gate: Callable[[Tensor], Tensor]  # as `gate`
    turner: Callable[[HeadLayout, Norm | None], TurnHeads]  # as `HeadTurner`


class TorchBlocks:
    """`Blocks` of torch's operations."""

    def __init__(self, precision: Precision, device: str, between: Between | None = None) -> None:
        self._precision = precision
        self._device = device
        self._between = between or Between(rms_norm, gate, HeadTurner)
        self._kind = linear_kind(precision, device)
        self.parameters = 0
        self.weight_bytes = 0

    def norm(self, norm: Norm) -> RowNorm:
        norm, normed = self._placed(norm), self._between.norm
        return lambda x: normed(x, norm)

    def normed_product(self, norm: Norm, weight: Tensor, bias: Tensor | None) -> NormedProduct:
        linear, normed = self._linear(weight, bias), self.norm(norm)

        def product(x: Tensor, out: Tensor) -> None:
            out.copy_(linear(normed(x)))

        return product

    def gated_product(self, norm: Norm, weight: Tensor, bias: Tensor | None) -> GatedProduct:
        linear, normed = self._linear(weight, bias), self.norm(norm)
        gated = self._between.gate
        return lambda x: gated(linear(normed(x)))

    def added_product(self, weight: Tensor, bias: Tensor | None) -> AddedProduct:
        linear = self._linear(weight, bias)

        def add(y: Tensor, total: Tensor) -> None:
            total += linear(y)

        return add

    def head(self, weight: Tensor) -> Head:
        linear = self._linear(weight, None)

        def scores(hidden: Tensor, out: Tensor | None = None) -> Tensor:
            logits = linear(hidden)
            return logits.float() if out is None else out.copy_(logits)

        return scores

    def turn_heads(self, layout: HeadLayout) -> TurnHeads:
        return self._between.turner(layout, self._head_weight(layout))

    def turn_positions(self, rotary: Rotary, context: int) -> TurnPositions:
        return PositionTurner(rotary, self._precision.compute, self._device)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        self.parameters += weight.numel()
        self.weight_bytes += weight.numel() * self._precision.weights.itemsize
        if bias is not None:
            bias = bias.to(self._device, self._precision.compute)
        return self._kind(weight.to(self._device, self._precision.compute), bias)

    def _placed(self, norm: Norm) -> Norm:
        return Norm(norm.weight.to(self._device, self._precision.compute), norm.epsilon)

    def _head_weight(self, layout: HeadLayout) -> Norm | None:
        """Norms of query and key heads as one, a row a head: [heads + kv_heads, head_dim]."""
        query, key = layout.query_norm, layout.key_norm
        if query is None or key is None:
            return None
        rows = [query.weight.expand(layout.heads, -1), key.weight.expand(layout.kv_heads, -1)]
        return self._placed(Norm(torch.cat(rows), query.epsilon))


class PositionTurner:
    """cos and signed sin of positions: [rows, 1, head_dim] each."""

    def __init__(self, rotary: Rotary, dtype: torch.dtype, device: str) -> None:
        self._frequencies = torch.cat([rotary.frequencies, rotary.frequencies]).to(device)
        self._scale = rotary.scale
        self._dtype = dtype
        self._sign = torch.ones_like(self._frequencies)
        self._sign[: len(rotary.frequencies)] = -1

    def __call__(self, positions: Tensor) -> Rotation:
        angles = positions[:, None, None].float() * self._frequencies
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale * self._sign
        return cos.to(self._dtype), sin.to(self._dtype)


class HeadTurner:
    """See `TurnHeads`."""

    def __init__(self, layout: HeadLayout, norm: Norm | None) -> None:
        self._layout = layout
        self._norm = norm  # of all rotated heads

    def __call__(self, qkv: Tensor, rotation: Rotation, pool: Tensor, write_at: Tensor) -> None:
        layout = self._layout
        heads = qkv.view(len(qkv), layout.heads + 2 * layout.kv_heads, layout.head_dim)
        turned = heads[:, : layout.heads + layout.kv_heads]
        if self._norm is not None:
            normed = F.rms_norm(turned, (layout.head_dim,), None, self._norm.epsilon)
            torch.mul(normed, self._norm.weight, out=turned)
        cos, sin = rotation
        swapped = turned.roll(layout.head_dim // 2, -1)
        turned.mul_(cos).addcmul_(swapped, sin)
        pool.index_copy_(0, write_at, qkv[:, layout.heads * layout.head_dim :])
