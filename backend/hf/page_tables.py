"""Where each slot's positions lie, and the tensors of a step that follow from it.

Owned by the executor. A table row is changed by what a plan appends to it, never rebuilt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan
from backend.interface import BackendSpec, Chunk, StepPlan


class PageTables:
    """Page ids of every slot: [max_running, pages of the longest sequence] int64."""

    def __init__(self, spec: BackendSpec, device: str) -> None:
        longest = spec.pages_for(min(spec.max_model_len, spec.pages * spec.page_tokens))
        self._page_tokens = spec.page_tokens
        self._pages_for = spec.pages_for
        self._table = torch.zeros(spec.max_running, longest, dtype=torch.int64, device=device)
        self._held = [0] * spec.max_running  # pages of each slot
        self._device = device

    def batch(self, plan: StepPlan, last_token: Tensor) -> ForwardBatch:
        """The tensors of a step. `last_token` [max_running] is what decodes read."""
        for chunk in plan.chunks:
            self._append(chunk)
        decodes = [chunk for chunk in plan.chunks if chunk.tokens is None]
        prompts = [chunk for chunk in plan.chunks if chunk.tokens is not None]
        slots = self._ids([chunk.slot for chunk in decodes])
        known = [token for chunk in prompts for token in chunk.tokens or ()]
        starts = self._ids([chunk.start for chunk in decodes])
        positions = torch.cat([starts, *map(self._positions, prompts)])
        return ForwardBatch(
            token_ids=torch.cat([last_token[slots], self._ids(known)]),
            positions=positions,
            write_at=self._write_at(slots, prompts, positions),
            decodes=self._decode_rows(slots, decodes, starts),
            spans=self._spans(prompts, len(decodes)),
        )

    def _append(self, chunk: Chunk) -> None:
        held = 0 if chunk.first else self._held[chunk.slot]
        if chunk.pages:
            end = held + len(chunk.pages)
            self._table[chunk.slot, held:end] = self._ids(list(chunk.pages))
            held = end
        self._held[chunk.slot] = held

    def _positions(self, chunk: Chunk) -> Tensor:
        return torch.arange(chunk.start, chunk.start + chunk.count, device=self._device)

    def _write_at(self, slots: Tensor, prompts: list[Chunk], positions: Tensor) -> Tensor:
        owners = [slots, *(slots.new_full((chunk.count,), chunk.slot) for chunk in prompts)]
        pages = self._table[torch.cat(owners), positions // self._page_tokens]
        return pages * self._page_tokens + positions % self._page_tokens

    def _decode_rows(self, slots: Tensor, decodes: list[Chunk], starts: Tensor) -> DecodeRows:
        longest = max((chunk.start + 1 for chunk in decodes), default=0)
        pages = self._table[slots, : self._pages_for(longest)]
        return DecodeRows(len(decodes), pages, starts + 1)

    def _spans(self, prompts: list[Chunk], offset: int) -> tuple[PrefillSpan, ...]:
        spans = []
        for chunk in prompts:
            pages = self._table[chunk.slot, : self._pages_for(chunk.start + chunk.count)]
            spans.append(PrefillSpan(offset, chunk.count, chunk.start, pages))
            offset += chunk.count
        return tuple(spans)

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
