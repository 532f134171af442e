"""The seam between a model and the kernels that read paged KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from backend.hf.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Shape of the KV cache: one group of layers, each token one row of K heads, then V heads."""

    layers: int
    kv_heads: int
    key_width: int  # of a head
    value_width: int

    @property
    def row(self) -> int:
        """Elements of one token in one layer."""
        return self.kv_heads * (self.key_width + self.value_width)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How one layer attends. An implementation honours all of it or refuses at start."""

    scale: float  # on the dot products
    window: int | None = None  # positions that a query sees, its own included; None: all
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = None  # [heads]: logits in the softmax that have no value


@dataclass(frozen=True, slots=True)
class AttentionSetup:
    """What an implementation is opened for."""

    geometry: KvGeometry
    pages: int
    page_tokens: int
    dtype: torch.dtype
    device: str
    deterministic: bool = False  # DETERMINISTIC: a row's bits depend on nothing but its sequence


class PagedAttention(Protocol):
    """Owns the KV pools and attends over their pages. One owner: the executor."""

    @property
    def pools(self) -> Sequence[Tensor]:
        """One a layer, as `kv_pools` makes them."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        kv: Tensor,
        batch: ForwardBatch,
        options: AttentionOptions,
        output: Tensor,
    ) -> None:
        """Causal attention of every token of `batch` over its own sequence.

        query [tokens, heads, key_width]; kv [tokens, row]: K heads, then V heads, of these tokens,
        which the model has written to `batch.write_at` of this layer's pool already. The result
        goes into `output` [tokens, heads, value_width], which is dense. heads is a multiple of
        kv_heads: query head h reads KV head h // (heads // kv_heads).
        """
