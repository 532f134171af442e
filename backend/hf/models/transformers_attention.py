"""transformers' attention interface with a step of ours behind it.

What a step needs travels as a keyword of the forward call, which the modelling code hands down to
its attention layers: nothing here remembers a step. Under the name PAGED transformers builds no
mask, because no mask function is registered for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from backend.hf.attention import AttentionOptions, PagedAttention
from backend.hf.batch import ForwardBatch

EAGER = "eager"  # transformers' own reference
PAGED = "minisgl_paged"
MASK_PROBE = "minisgl_mask_probe"  # the same, but shows each layer what the model would mask
STEP = "minisgl_step"  # the keyword

FAR = 1 << 20  # a position beyond every window: what it sees tells the window


class StepAttention(Protocol):
    """The attention of one forward pass."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        """query [tokens, heads, key_width], key and value [tokens, kv_heads, width]: the output,
        [tokens, heads, value_width].

        `mask` is what the modelling code made of its mask function: None under PAGED.
        """


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A step over the pages."""

    batch: ForwardBatch
    attention: PagedAttention

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        kv = torch.cat((key.flatten(1), value.flatten(1)), dim=1)
        self.attention.pools[layer].index_copy_(0, self.batch.write_at, kv)
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        self.attention.attend(layer, query, kv, self.batch, options, output)
        return output


class NotProven(Exception):
    """Why a model cannot run here, to be said after its name."""


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    minisgl_step: StepAttention | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer.

    query [1, heads, tokens, key_width]; key and value [1, kv_heads, tokens, width]. Returns
    [1, tokens, heads, value_width]. Keywords unknown here may change the result: the probe at
    load compares with transformers' own attention.
    """
    if minisgl_step is None:
        raise NotProven("its layers drop the keyword that carries the step")
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or None,
        softcap=softcap or None,
        sinks=s_aux,
    )
    layer: int = module.layer_idx
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    output = minisgl_step.attend(layer, query, key, value, attention_mask, options)
    return output[None].contiguous(), None  # some modelling code takes a view of it


def _far_row(
    *, mask_function: Callable[..., Tensor], device: torch.device | str = "cpu", **_: Any
) -> Tensor:
    """What a query at the last of FAR positions sees: [1, 1, 1, FAR] bool."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    positions = torch.arange(FAR, device=device)
    return mask_function(zero, zero, positions[-1], positions).expand(1, 1, 1, FAR)


AttentionInterface.register(PAGED, _attend)
AttentionInterface.register(MASK_PROBE, _attend)
AttentionMaskInterface.register(MASK_PROBE, _far_row)
