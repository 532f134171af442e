"""The pieces that a decoder layer is made of, and the seam to whoever computes them.

Each piece is one operation, so that an implementation may launch one kernel for it: residual and
norm never stand between two pieces. `torch_blocks.py` composes them of torch's operations and runs
anywhere, `triton_blocks.py` has a kernel for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from backend.hf.models.rope import Rotary

Rotation: TypeAlias = Any  # what a step's positions turn heads by; the implementation's own


@dataclass(frozen=True, eq=False, slots=True)
class Norm:
    """An RMS norm (Zhang and Sennrich 2019)."""

    weight: Tensor  # [width]
    epsilon: float


@dataclass(frozen=True, eq=False, slots=True)
class HeadLayout:
    """One row of a query-key-value product: query heads, key heads, value heads, each head_dim
    wide; and the norms of query and key heads, where the model has them.
    """

    heads: int
    kv_heads: int
    head_dim: int
    query_norm: Norm | None = None
    key_norm: Norm | None = None


class RowNorm(Protocol):
    """Norms rows: x [rows, width] -> [rows, width]; x is kept."""

    def __call__(self, x: Tensor) -> Tensor: ...


class NormedProduct(Protocol):
    """Product of normed rows: x [rows, in] -> norm(x) @ weight.T + bias in `out` [rows, out]; x is
    kept.
    """

    def __call__(self, x: Tensor, out: Tensor) -> None: ...


class GatedProduct(Protocol):
    """x [rows, in] -> silu(gate) * up, [rows, out / 2], where gate and up are the halves of
    norm(x) @ weight.T + bias; x is kept.
    """

    def __call__(self, x: Tensor) -> Tensor: ...


class AddedProduct(Protocol):
    """total [rows, out] += y [rows, in] @ weight.T + bias."""

    def __call__(self, y: Tensor, total: Tensor) -> None: ...


class Head(Protocol):
    """Scores over the vocabulary: hidden [rows, in] -> [rows, vocabulary] float32, into `out` where
    given.
    """

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor: ...


class TurnHeads(Protocol):
    """What happens between the query-key-value product and attention, in place: query and key heads
    of `qkv` [rows, (heads + 2 kv_heads) * head_dim] are normed and rotated, and the rows of key and
    value heads are written to `pool` [positions, 2 kv_heads * head_dim] at `write_at` [rows] int64.
    """

    def __call__(self, qkv: Tensor, rotation: Rotation, pool: Tensor, write_at: Tensor) -> None: ...


class TurnPositions(Protocol):
    """The rotation of a step: positions [rows] int64. Called once a step, for all layers."""

    def __call__(self, positions: Tensor) -> Rotation: ...


class Blocks(Protocol):
    """Makes the pieces of one model, each from weights on any device in any dtype, which may be
    freed afterwards. Adds up what it was given.
    """

    parameters: int  # elements of the products' weights
    weight_bytes: int  # what a decode step reads of them

    def norm(self, norm: Norm) -> RowNorm: ...

    def normed_product(self, norm: Norm, weight: Tensor, bias: Tensor | None) -> NormedProduct:
        """weight [out, in], bias [out]."""

    def gated_product(self, norm: Norm, weight: Tensor, bias: Tensor | None) -> GatedProduct:
        """weight [out, in]: the gate's rows, then as many of up; bias [out]."""

    def added_product(self, weight: Tensor, bias: Tensor | None) -> AddedProduct:
        """weight [out, in], bias [out]."""

    def head(self, weight: Tensor) -> Head:
        """weight [vocabulary, in]. A table already on the device in the compute dtype is shared."""

    def turn_heads(self, layout: HeadLayout) -> TurnHeads: ...

    def turn_positions(self, rotary: Rotary, context: int) -> TurnPositions:
        """`context`: positions are below it."""
