"""The proof, at load, that a model of transformers runs on our attention.

A few short forward passes: transformers' own (eager) over two sequences; ours over the same tokens
in a mixed order, so that only position ids and the step tell them apart; and one that compares
each layer's mask with the window it asks for, which no short sequence would show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from backend.hf.attention import AttentionOptions, KvGeometry
from backend.hf.models.transformers_attention import (
    FAR,
    MASK_PROBE,
    PAGED,
    NotProven,
    StepAttention,
)
from backend.interface import Unsupported, first_line

TOKENS = 12  # of each probed sequence
ROUNDING = 8  # accepted error of the hidden states, in units of the dtype's precision
REFUSAL = "{name} does not run on paged attention by transformers' code: {reason}"
LEAST_ERROR = 1e-3  # accepted whatever the dtype: float32 products differ by their order


class ProbedModel(Protocol):
    """What the probe drives: a model of transformers, set to eager attention."""

    name: str
    vocabulary: int
    layers: int
    model: Any  # a PreTrainedModel: most of its methods carry no types

    def run(self, token_ids: Tensor, positions: Tensor, step: StepAttention) -> Tensor:
        """Final hidden states: token_ids, positions [1, tokens] to [1, tokens, hidden]."""

    def run_eager(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """transformers' own hidden states and logits of whole sequences, [rows, tokens]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocabulary] float32."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token."""

    kv_heads: int
    key_width: int
    value_width: int


class DenseStep:
    """Attention without pages, in float32: the token at `positions[i]` of sequence `owners[i]` sees
    its own sequence up to itself. Records what each layer asked for.
    """

    def __init__(self, owners: Tensor, positions: Tensor) -> None:
        self.shapes: list[tuple[int, LayerShape]] = []
        self._distance = positions[:, None] - positions  # [queries, keys]
        self._visible = (owners[:, None] == owners) & (self._distance >= 0)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        if mask is not None:
            raise NotProven(f"layer {layer} attends by a mask of its own making")
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % kv_heads:
            raise NotProven(f"layer {layer} has {heads} query heads for {kv_heads} KV heads")
        self.shapes.append((layer, LayerShape(kv_heads, key.shape[2], value.shape[2])))
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        visible = self._visible
        if options.window is not None:
            visible = visible & (self._distance < options.window)
        scores = scores.masked_fill(~visible, float("-inf"))
        if options.sinks is not None:
            sinks = options.sinks.float()[:, None, None].expand(-1, len(query), 1)
            scores = torch.cat((scores, sinks), dim=2)
        weights = scores.softmax(dim=2)[:, :, : len(query)]
        return torch.einsum("hqk,khd->qhd", weights, value.float()).to(value.dtype)


class MaskStep:
    """Attends to nothing: compares each layer's mask with its window."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        window = min(options.window or FAR, FAR)
        if mask is not None and (
            mask.shape[-1] != FAR
            or int(mask.sum()) != window
            or not bool(mask[..., -window:].all())
        ):
            raise NotProven(
                f"layer {layer} asks for a window of {options.window} positions"
                f" and its mask shows {int(mask.sum())} of {mask.shape[-1]}"
            )
        return query.new_zeros(*query.shape[:2], value.shape[2])


def probe(probed: ProbedModel, device: str) -> KvGeometry:
    """The KV geometry of a model proven to run on our attention, which it is left set to.

    Raises Unsupported naming the model and the first proof that failed.
    """
    try:
        with torch.no_grad():
            return _prove(probed, device)
    except NotProven as error:
        raise Unsupported(REFUSAL.format(name=probed.name, reason=error)) from error
    except Exception as error:  # foreign modelling code: it raises whatever it likes
        reason = f"its forward pass failed: {first_line(error)}"
        raise Unsupported(REFUSAL.format(name=probed.name, reason=reason)) from error


def _prove(probed: ProbedModel, device: str) -> KvGeometry:
    count = 2 * TOKENS
    token_ids = torch.arange(3, 3 + 7 * count, 7, device=device) % probed.vocabulary
    positions = torch.arange(count, device=device) % TOKENS
    owners = torch.arange(count, device=device) // TOKENS
    order = torch.arange(0, 5 * count, 5, device=device) % count  # no divisor in common: a shuffle
    hidden, logits = probed.run_eager(token_ids.view(2, TOKENS))
    _compare("logits", probed.logits(hidden).flatten(0, 1), logits.flatten(0, 1))

    probed.model.set_attn_implementation(PAGED)
    step = DenseStep(owners[order], positions[order])
    ours = probed.run(token_ids[order][None], positions[order][None], step)[0]
    geometry = _geometry(step.shapes, probed.layers)

    probed.model.set_attn_implementation(MASK_PROBE)
    probed.run(token_ids[None, :2], positions[None, :2], MaskStep())
    probed.model.set_attn_implementation(PAGED)
    _compare("hidden states", ours, hidden.flatten(0, 1)[order])
    return geometry


def _geometry(shapes: list[tuple[int, LayerShape]], layers: int) -> KvGeometry:
    ran = sorted(layer for layer, _ in shapes)
    if not ran:
        raise NotProven("its attention does not go through transformers' attention interface")
    if ran != list(range(layers)):
        raise NotProven(
            f"attention must run once in each of its {layers} layers, and ran in layers {ran}"
        )
    kinds = {shape for _, shape in shapes}
    if len(kinds) > 1:
        raise NotProven(f"its layers differ in KV shape: {sorted(map(str, kinds))}")
    shape = kinds.pop()
    return KvGeometry(layers, shape.kv_heads, shape.key_width, shape.value_width)


def _compare(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Median over tokens of the relative error: where rounding sends one token to another expert,
    the rest still tell.
    """
    accepted = max(LEAST_ERROR, ROUNDING * torch.finfo(theirs.dtype).eps)
    theirs = theirs.float()
    error = ((ours.float() - theirs).norm(dim=1) / theirs.norm(dim=1)).median().item()
    if not error <= accepted:  # NaN is an error too
        raise NotProven(
            f"its {what} differ from transformers' own by {error:.1e}, accepted {accepted:.1e}"
        )
