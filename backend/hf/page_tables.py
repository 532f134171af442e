"""Where each slot's positions lie, and the tensors of a step that follow from it.

Owned by the executor. The table stays on the device; a step sends what it appends, nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan
from backend.hf.transfer import to_device
from backend.interface import BackendSpec, Chunk


class PageTables:
    """Page ids of every slot: [max_running + 1, pages of the longest sequence] int64.

    The last slot is the spare one: a padding row of a graph stands there, on the spare page.
    """

    def __init__(self, spec: BackendSpec) -> None:
        longest = spec.pages_for(min(spec.max_model_len, spec.pages * spec.page_tokens))
        self._page_tokens = spec.page_tokens
        self._pages_for = spec.pages_for
        shape = (spec.max_running + 1, longest)
        self._table = torch.zeros(shape, dtype=torch.int64, device=spec.device)
        self._table[-1] = spec.pages
        self._held = [0] * spec.max_running  # pages of each slot
        self._device = spec.device

    @property
    def spare_slot(self) -> int:
        return len(self._held)

    def append(self, chunks: Sequence[Chunk]) -> None:
        """Take over the pages that a step brings."""
        cells: list[int] = []
        pages: list[int] = []
        for chunk in chunks:
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
        rows = DecodeRows(len(slots), slots, positions + 1, self._table, bound)
        return ForwardBatch(
            token_ids=last_token[slots],
            positions=positions,
            write_at=self._places(slots, positions),
            decodes=rows,
            spans=(),
        )

    def batch(self, chunks: Sequence[Chunk], last_token: Tensor) -> ForwardBatch:
        """A mixed step: decodes, then chunks of prompts."""
        decodes = [chunk for chunk in chunks if chunk.tokens is None]
        prompts = chunks[len(decodes) :]
        owners = np.repeat([chunk.slot for chunk in chunks], [chunk.count for chunk in chunks])
        positions = [np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks]
        known = [token for chunk in prompts for token in chunk.tokens or ()]
        sent = to_device(np.concatenate([owners, *positions, known]), self._device)
        tokens, count = len(owners), len(decodes)
        slots, at, ids = sent.split([tokens, tokens, len(known)])
        longest = max((chunk.start + 1 for chunk in decodes), default=0)
        bound = self._pages_for(longest)
        return ForwardBatch(
            token_ids=torch.cat([last_token[slots[:count]], ids]),
            positions=at,
            write_at=self._places(slots, at),
            decodes=DecodeRows(count, slots[:count], at[:count] + 1, self._table, bound),
            spans=self._spans(prompts, count),
        )

    def _places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows of the KV pool [rows] int64."""
        pages = self._table[slots, positions // self._page_tokens]
        return pages * self._page_tokens + positions % self._page_tokens

    def _spans(self, prompts: Sequence[Chunk], offset: int) -> tuple[PrefillSpan, ...]:
        spans = []
        for chunk in prompts:
            pages = self._table[chunk.slot, : self._pages_for(chunk.start + chunk.count)]
            spans.append(PrefillSpan(offset, chunk.count, chunk.start, pages))
            offset += chunk.count
        return tuple(spans)
