"""Which rows of a step edit their logits before the draw, and the edit: the mask of a grammar,
penalties, bias, and stop ids that may not be drawn yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backend.hf.sampling.penalties import PenalisedRows
from backend.hf.transfer import stacked, to_device
from backend.interface import SlotSetup, TokenMask

Array = np.ndarray[Any, Any]
NOTHING: Array = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False, slots=True)
class SlotEdits:
    """What a slot does to its logits, on the host."""

    penalised: bool
    biased: Array  # [entries] int64: token ids, each there once
    biases: Array  # [entries] float32: what is added to their logits
    stop_ids: Array  # [ids] int64: not drawn while the position drawn is below
    min_position: int

    @classmethod
    def of(cls, setup: SlotSetup) -> SlotEdits | None:
        """None: the slot never edits."""
        biases: dict[int, float] = {}
        for token, bias in setup.sampling.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        min_position = setup.min_position if setup.stop_ids else 0
        if not (setup.sampling.penalised or biases or min_position):
            return None
        return cls(
            setup.sampling.penalised,
            np.array(list(biases), dtype=np.int64),
            np.array(list(biases.values()), dtype=np.float32),
            np.array(sorted(set(setup.stop_ids)), dtype=np.int64),
            min_position,
        )

    def asks(self, position: int) -> bool:
        """Whether the draw at `position` needs an edit."""
        return self.penalised or len(self.biased) > 0 or position < self.min_position


@dataclass(frozen=True, eq=False, slots=True)
class RowEdits:
    """The rows of a batch that edit their logits, those with a mask first. A cell is
    row * vocabulary + token, the row among those edited.
    """

    rows: Tensor  # [edited] int64: their places in the batch
    slots: Tensor  # [edited] int64
    positions: Tensor  # [edited] int64
    on_host: tuple[int, ...]  # the slots again
    masks: Tensor | None  # [masked, words] int32
    penalised: PenalisedRows | None
    biased: Tensor  # [entries] int64 cells
    biases: Tensor | None  # [entries] float32; None: there are none
    forbidden: Tensor  # [cells] int64

    def apply(self, logits: Tensor) -> None:
        """Bias `logits` [edited, vocabulary] float32, contiguous, and forbid stopping, in place.
        Penalties go before.
        """
        cells = logits.view(-1)
        if self.biases is not None:
            cells.index_add_(0, self.biased, self.biases)
        if len(self.forbidden):
            cells.index_fill_(0, self.forbidden, -math.inf)


def _asking(
    edits: Mapping[int, SlotEdits],
    slots: Sequence[int],
    positions: Sequence[int],
    masks: Mapping[int, TokenMask],
) -> Iterator[int]:
    """The rows without a mask that edit their logits."""
    for row, slot in enumerate(slots):
        if slot in edits and row not in masks and edits[slot].asks(positions[row]):
            yield row


def edits_of(
    edits: Mapping[int, SlotEdits],
    slots: Sequence[int],
    positions: Sequence[int],
    masks: Mapping[int, TokenMask],
    vocabulary: int,
    device: torch.device,
) -> RowEdits | None:
    """The edits of a batch whose row i belongs to `slots[i]`, draws the token at `positions[i]`,
    and is bound by `masks[i]`, if that is there. None: no row asks.
    """
    if not (edits or masks):
        return None
    rows = [*masks, *_asking(edits, slots, positions, masks)]
    if not rows:
        return None
    at = [positions[row] for row in rows]
    on_host = tuple(slots[row] for row in rows)
    asking = {index: edits[slot] for index, slot in enumerate(on_host) if slot in edits}
    penalised = [index for index, edit in asking.items() if edit.penalised]
    penalised_slots = tuple(on_host[index] for index in penalised)
    biased = [index * vocabulary + edit.biased for index, edit in asking.items()]
    forbidden = [
        index * vocabulary + edit.stop_ids
        for index, edit in asking.items()
        if at[index] < edit.min_position
    ]
    lists = [rows, on_host, at, penalised, penalised_slots]
    parts = [np.asarray(part, dtype=np.int64) for part in lists]
    parts += [np.concatenate([*cells, NOTHING]) for cells in (biased, forbidden)]
    sent = to_device(np.concatenate(parts), device).split([len(part) for part in parts])
    biases = [edit.biases for edit in asking.values() if len(edit.biases)]
    return RowEdits(
        rows=sent[0],
        slots=sent[1],
        positions=sent[2],
        on_host=on_host,
        masks=stacked(list(masks.values()), device) if masks else None,
        penalised=PenalisedRows(sent[3], sent[4], penalised_slots) if penalised else None,
        biased=sent[5],
        biases=to_device(np.concatenate(biases), device, torch.float32) if biases else None,
        forbidden=sent[6],
    )
