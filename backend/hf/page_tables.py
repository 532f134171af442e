"""Where each slot's positions lie, and the tensors of a step that follow from it.

Owned by the executor. The table stays on the device; a step sends what it appends, nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan
from backend.hf.transfer import to_device
from backend.interface import BackendSpec, Chunk


class StepInputs(Protocol):
    """token_ids, write_at and lengths, [rows] int64 each, of decodes in `slots` [rows] at
    `positions` [rows]: the token that each slot drew last (`last_token` [slots]), the row of the KV
    pool, and the positions attended to. table [slots, max_pages]: page ids. All are int64.
    """

    def __call__(
        self,
        slots: Tensor,
        positions: Tensor,
        last_token: Tensor,
        table: Tensor,
        page_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def torch_step_inputs(
    slots: Tensor, positions: Tensor, last_token: Tensor, table: Tensor, page_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`StepInputs` by torch's operations."""
    return last_token[slots], places(slots, positions, table, page_tokens), positions + 1


def places(slots: Tensor, positions: Tensor, table: Tensor, page_tokens: int) -> Tensor:
    """Rows of the KV pool, [rows] int64."""
    return table[slots, positions // page_tokens] * page_tokens + positions % page_tokens


def open_step_inputs(kernels: bool) -> StepInputs:
    """One launch of ours where our kernels run."""
    if not kernels:
        return torch_step_inputs
    from backend.hf.kernels.step_inputs import step_inputs  # triton is there with CUDA only

    return step_inputs


class PageTables:
    """Page ids of every slot: [max_running + 1, pages of the longest sequence] int64.

    The last slot is the spare one: a padding row of a graph stands there, on the spare page.
    """

    def __init__(self, spec: BackendSpec, kernels: bool = False) -> None:
        """`kernels`: ours run on this device."""
        longest = spec.pages_for(min(spec.max_model_len, spec.pages * spec.page_tokens))
        self._page_tokens = spec.page_tokens
        self._pages_for = spec.pages_for
        shape = (spec.max_running + 1, longest)
        self._table = torch.zeros(shape, dtype=torch.int64, device=spec.device)
        self._table[-1] = spec.pages
        self._held = [0] * spec.max_running  # pages of each slot
        self._device = spec.device
        self._step_inputs = open_step_inputs(kernels)

    @property
    def spare_slot(self) -> int:
        return len(self._held)

    def append(self, chunks: Sequence[Chunk]) -> None:
        """Take over the pages that a step brings."""
        cells: list[int] = []
        pages: list[int] = []
        for chunk in chunks:
            if not (chunk.pages or chunk.first):
                continue
            held = 0 if chunk.first else self._held[chunk.slot]
            first = chunk.slot * self._table.shape[1] + held
            cells += range(first, first + len(chunk.pages))
            pages += chunk.pages
            self._held[chunk.slot] = held + len(chunk.pages)
        if cells:
            sent = to_device([cells, pages], self._device)
            self._table.view(-1).index_copy_(0, sent[0], sent[1])

    def decodes(
        self, slots: Tensor, positions: Tensor, longest: int, last_token: Tensor
    ) -> ForwardBatch:
        """A step of decodes alone, by device work alone: rows of `slots` [rows] int64, each with
        the token it drew last (`last_token` [max_running + 1]) at `positions` [rows] int64, which
        are below `longest`.
        """
        bound = min(self._pages_for(longest), self._table.shape[1])
        token_ids, write_at, lengths = self._step_inputs(
            slots, positions, last_token, self._table, self._page_tokens
        )
        rows = DecodeRows(len(slots), slots, lengths, self._table, bound)
        return ForwardBatch(token_ids, positions, write_at, rows, spans=())

    def batch(self, chunks: Sequence[Chunk], last_token: Tensor) -> ForwardBatch:
        """A mixed step: decodes, then chunks of prompts."""
        decodes = [chunk for chunk in chunks if chunk.tokens is None]
        prompts = chunks[len(decodes) :]
        owners = np.repeat([chunk.slot for chunk in chunks], [chunk.count for chunk in chunks])
        positions = [np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks]
        known = [np.array(chunk.tokens, dtype=np.int64) for chunk in prompts]
        sent = to_device(np.concatenate([owners, *positions, *known]), self._device)
        tokens, count = len(owners), len(decodes)
        slots, at, ids = sent.split([tokens, tokens, tokens - count])
        longest = max((chunk.start + 1 for chunk in decodes), default=0)
        bound = self._pages_for(longest)
        return ForwardBatch(
            token_ids=torch.cat([last_token[slots[:count]], ids]),
            positions=at,
            write_at=places(slots, at, self._table, self._page_tokens),
            decodes=DecodeRows(count, slots[:count], at[:count] + 1, self._table, bound),
            spans=self._spans(prompts, count),
        )

    def _spans(self, prompts: Sequence[Chunk], offset: int) -> tuple[PrefillSpan, ...]:
        spans = []
        for chunk in prompts:
            pages = self._table[chunk.slot, : self._pages_for(chunk.start + chunk.count)]
            spans.append(PrefillSpan(offset, chunk.count, chunk.start, pages))
            offset += chunk.count
        return tuple(spans)
