"""Which tokens each slot has seen, how often, and what that does to their logits.

Frequency and presence as in OpenAI's API (generated tokens); repetition as in CTRL, Keskar et al.
2019 (prompt and generated tokens). Only the logits of tokens seen are touched: a few thousand of a
row, not the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.hf.transfer import to_device
from backend.interface import SamplingParams, SlotSetup


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

    def fill(self, setups: Sequence[SlotSetup]) -> None:
        """Start the slots of `setups` from their prompts, which are not empty, and their output so
        far.
        """
        seen = [sorted({*setup.prompt, *setup.output}) for setup in setups]
        slots = [setup.slot for setup in setups]
        lengths = [len(ids) for ids in seen]
        for slot, length in zip(slots, lengths, strict=True):
            self._lengths[slot] = length
        self._make_room(max(lengths))
        room, vocabulary = self._seen.shape[1], self._generated.shape[1]
        counts = [Counter(setup.output) for setup in setups]
        parts = [
            slots,
            lengths,
            [ids[0] for ids in seen],
            [
                slot * room + place
                for slot, ids in zip(slots, seen, strict=True)
                for place in range(len(ids))
            ],
            [token for ids in seen for token in ids],
            [
                slot * vocabulary + token
                for slot, count in zip(slots, counts, strict=True)
                for token in count
            ],
            [number for count in counts for number in count.values()],
        ]
        sent = to_device([value for part in parts for value in part], self._seen.device)
        rows, length, first, places, ids, cells, numbers = sent.split([len(part) for part in parts])
        self._seen.index_copy_(0, rows, first[:, None].expand(-1, room))
        self._seen.view(-1).index_copy_(0, places, ids)
        self._length.index_copy_(0, rows, length)
        self._generated.index_fill_(0, rows, 0)
        self._generated.view(-1).index_copy_(0, cells, numbers.int())
        strengths = [_strengths(setup.sampling) for setup in setups]
        sent = to_device(strengths, self._seen.device, torch.float32)
        self._strengths.index_copy_(0, rows, sent)

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


def _strengths(sampling: SamplingParams) -> list[float]:
    """Of repetition, frequency and presence."""
    # within what float32 holds: 0 * inf would be NaN
    repetition = min(max(sampling.repetition_penalty, 1e-30), 1e30)
    return [repetition, sampling.frequency_penalty, sampling.presence_penalty]
