"""Model code: what a model is to the executor, and the configuration and weights that it is built
from.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor

from backend.hf.attention import KvGeometry, PagedAttention
from backend.hf.batch import ForwardBatch
from backend.interface import ModelBroken

T = TypeVar("T")
Number = TypeVar("Number", int, float)

ModelConfig = dict[str, Any]  # a checkpoint's config.json


def config_value(config: ModelConfig, key: str, kind: type[T], default: T | None = None) -> T:
    """`key` of a config.json, or of an object in it. null is the same as missing; a whole number
    will do for a float.

    Raises ModelBroken when it is of another type, or missing and without a default.
    """
    value = config.get(key)
    if value is None:
        value = default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: true is no number
        there = "nothing" if value is None else repr(value)[:60]
        raise ModelBroken(f"config.json: {key} must be {kind.__name__}, has {there}")
    return value


def positive(
    config: ModelConfig, key: str, kind: type[Number], default: Number | None = None
) -> Number:
    """`config_value` of a number that is above zero."""
    value = config_value(config, key, kind, default)
    if not value > 0:
        raise ModelBroken(f"config.json: {key} must be above 0, has {value}")
    return value


class WeightSource(Protocol):
    """Named tensors of a checkpoint. Read once each, while a model is built."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, on the CPU, in the checkpoint's dtype.

        Raises ModelBroken naming it when missing or of another shape.
        """


class CausalModel(Protocol):
    """A decoder over paged KV. Holds weights and nothing of any sequence."""

    geometry: KvGeometry
    vocabulary: int
    parameters: int
    weight_bytes: int  # read by one decode step

    def hidden(self, batch: ForwardBatch, attention: PagedAttention) -> Tensor:
        """Final hidden states, ready for the head: [tokens, hidden]."""

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Scores over the vocabulary, [rows, vocabulary] float32, for some rows of `hidden`; in
        `out` where given.
        """
