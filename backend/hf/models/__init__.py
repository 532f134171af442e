"""Model code: what a model is to the executor, and the weights that it is built from."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from backend.hf.attention import KvGeometry, PagedAttention
from backend.hf.batch import ForwardBatch

ModelConfig = dict[str, Any]  # a checkpoint's config.json


class WeightSource(Protocol):
    """Named tensors of a checkpoint. Read once each, while a model is built."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds `name`; a made-up checkpoint (dummy) holds every name."""

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

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, [rows, vocabulary] float32, for some rows of `hidden`."""
