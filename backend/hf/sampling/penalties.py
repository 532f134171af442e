"""Which tokens each slot has seen, how often, and what that does to their logits.

Frequency and presence as in OpenAI's API (generated tokens); repetition as in CTRL, Keskar et al.
2019 (prompt and generated tokens). Only the logits of tokens seen are touched: a few thousand of a
row, not the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.interface import SlotSetup


@dataclass(frozen=True, slots=True)
class PenalisedRows:
    """Rows of a batch that ask for penalties."""

    rows: Tensor  # [penalised] int64
    slots: Tensor  # [penalised] int64
    on_host: tuple[int, ...]  # the slots again


class PenaltyTables:
    """History and strengths of every slot, on the device.

    4 bytes for each slot and token of the vocabulary, so they are made for the first request that
    asks. Rows of slots that ask for nothing are stale and never read.

        seen       [ ids of prompt and output, once each ][ drawn since ][ the first id, again ]
                   0 ........................................... length ................... room
    """

    def __init__(self, max_running: int, vocabulary: int, device: torch.device) -> None:
        self._generated = torch.zeros(max_running, vocabulary, dtype=torch.int32, device=device)
        self._seen = torch.zeros(max_running, 64, dtype=torch.int64, device=device)
        self._length = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._lengths = [0] * max_running  # the same on the host
        self._strengths = torch.zeros(max_running, 3, device=device)

    def fill(self, setup: SlotSetup) -> None:
        """Start the slot of `setup` from its prompt, which is not empty, and its output so far."""
        slot, sampling = setup.slot, setup.sampling
        output = torch.tensor(setup.output, dtype=torch.int64)
        self._generated[slot] = output.bincount(minlength=self._generated.shape[1])
        seen = sorted({*setup.prompt, *setup.output})
        self._make_room(len(seen))
        self._seen[slot] = seen[0]
        self._seen[slot, : len(seen)] = torch.tensor(seen)
        self._length[slot] = self._lengths[slot] = len(seen)
        # within what float32 holds: 0 * inf would be NaN
        repetition = min(max(sampling.repetition_penalty, 1e-30), 1e30)
        strengths = [repetition, sampling.frequency_penalty, sampling.presence_penalty]
        self._strengths[slot] = torch.tensor(strengths)

    def _make_room(self, length: int) -> None:
        room = self._seen.shape[1]
        if length > room:
            more = max(length, 2 * room) - room
            self._seen = torch.cat([self._seen, self._seen[:, :1].expand(-1, more)], dim=1)

    def apply(self, logits: Tensor, penalised: PenalisedRows) -> None:
        """Penalise these rows of `logits` [rows, vocabulary] float32 in place."""
        slots = penalised.slots
        length = max(self._lengths[slot] for slot in penalised.on_host)
        ids = self._seen[:, :length][slots]
        repetition, frequency, presence = self._strengths[slots][:, :, None].unbind(1)
        counts = self._generated[slots[:, None], ids]
        # an id that is there twice gets the same value twice
        where = (penalised.rows[:, None], ids)
        values = logits[where]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= counts * frequency + (counts > 0) * presence
        logits[where] = values.clamp_(max=torch.finfo(logits.dtype).max)

    def advance(self, penalised: PenalisedRows, tokens: Tensor) -> None:
        """Count the `tokens` [penalised] that these rows have drawn."""
        slots = penalised.slots
        for slot in penalised.on_host:
            self._lengths[slot] += 1
        self._make_room(max(self._lengths[slot] for slot in penalised.on_host))
        self._seen[slots, self._length[slots]] = tokens
        self._length[slots] += 1
        self._generated[slots, tokens] += 1
