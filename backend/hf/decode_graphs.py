"""Decode steps as CUDA graphs: inputs, model, head and draw in one launch, by the number of rows.

A step of fewer rows than its graph has is padded: padding rows stand in the spare slot, on the
spare page. Rows that grammars bind are drawn again by a graph of their own, once it is known what
they may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from backend.hf.cuda_graphs import Recorder, Sizes, ladder
from backend.hf.transfer import send
from backend.interface import TokenMask

# Rows: (up to, apart). A row of padding costs the head and the draw a row of logits.
STEPS = ((2, 1), (4, 2), (16, 4), (32, 8), (128, 16), (256, 32), (1 << 30, 128))


MOST_REDRAWN = 64  # rows of a step with masks: each takes a copy of its logits


class Decode(Protocol):
    """A step of decodes by device work alone: slots and positions [rows] int64 to tokens [rows]
    int64, raw logits [rows, vocabulary] float32 in `logits`.
    """

    def __call__(self, slots: Tensor, positions: Tensor, logits: Tensor) -> Tensor: ...


class Redraw(Protocol):
    """A draw by device work alone of rows [rows, vocabulary] of raw logits, bound by masks [rows,
    words] int32: tokens [rows] int64, which are in their slots, too.
    """

    def __call__(
        self, logits: Tensor, slots: Tensor, positions: Tensor, masks: Tensor
    ) -> Tensor: ...


@dataclass(frozen=True, eq=False, slots=True)
class Captured:
    """A graph and where it leaves the tokens it draws."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [size] int64


class DecodeGraphs:
    """The decode graphs of one executor."""

    def __init__(
        self,
        decode: Decode,
        redraw: Redraw,
        recorder: Recorder,
        largest: int,
        vocabulary: int,
        spare_slot: int,
        device: str,
    ) -> None:
        self._decode = decode
        self._redraw = redraw
        self._recorder = recorder
        self._sizes = Sizes(ladder(largest, STEPS), self._capture)
        most = min(largest, MOST_REDRAWN)
        self._redraws = Sizes(ladder(most, STEPS), self._capture_redraw)
        self._spare_slot = spare_slot
        # slots of a size, then its positions
        self._inputs = torch.zeros(2 * self._sizes.largest, dtype=torch.int64, device=device)
        self._logits = torch.empty(self._sizes.largest, vocabulary, device=device)
        # all tokens allowed, but in the rows of the step that is redrawn
        self._anything = np.full(-(-vocabulary // 32), -1, dtype=np.int32)
        self._masks = torch.full((most, len(self._anything)), -1, dtype=torch.int32, device=device)

    def run(self, slots: list[int], positions: list[int]) -> tuple[Tensor, Tensor] | None:
        """Tokens [rows] int64 and raw logits [rows, vocabulary] float32 of a step, good until the
        next one. None where its size is not captured yet.
        """
        rows = len(slots)
        found = self._sizes.find(rows)
        if found is None:
            return None
        size, captured = found
        inputs = np.zeros((2, size), dtype=np.int64)
        inputs[0] = self._spare_slot
        inputs[:, :rows] = slots, positions
        send(inputs.reshape(-1), self._inputs[: 2 * size])
        captured.graph.replay()
        return captured.tokens[:rows], self._logits[:rows]

    def redraw(self, rows: int, masks: Mapping[int, TokenMask]) -> Tensor | None:
        """Draw the rows of the last step again, those in `masks` bound by them. Tokens [rows]
        int64, good until the next step. None where its size is not captured yet.
        """
        found = self._redraws.find(rows)
        if found is None:
            return None
        _, captured = found
        words = np.stack([masks.get(row, self._anything) for row in range(rows)])
        send(words, self._masks[:rows])
        captured.graph.replay()
        return captured.tokens[:rows]

    def prepare(self) -> bool:
        """Capture one more graph. False: all of them are there."""
        return self._sizes.prepare()

    def _capture(self, size: int) -> Captured:
        slots, positions = self._spare_inputs(size)

        def work() -> Tensor:
            return self._decode(slots, positions, self._logits[:size])

        work()
        return Captured(*self._recorder.record(work))

    def _capture_redraw(self, size: int) -> Captured:
        inputs = self._inputs.clone()  # the step's, which has not been redrawn yet
        slots, positions = self._spare_inputs(size)

        def work() -> Tensor:
            return self._redraw(self._logits[:size], slots, positions + 1, self._masks[:size])

        work()
        captured = Captured(*self._recorder.record(work))
        self._inputs.copy_(inputs)
        return captured

    def _spare_inputs(self, size: int) -> tuple[Tensor, Tensor]:
        """Slots and positions of a size, all of them spare."""
        self._inputs[:size] = self._spare_slot
        self._inputs[size : 2 * size] = 0
        slots, positions = self._inputs[: 2 * size].split(size)
        return slots, positions
