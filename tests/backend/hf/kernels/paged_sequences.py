"""Sequences of random keys and values in pages, to attend over: what tests of attention share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from backend.hf.attention import (
    AttentionOptions,
    AttentionSetup,
    KvGeometry,
    PagedAttention,
)
from backend.hf.attention.choice import open_attention
from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan


class Part(NamedTuple):
    """Positions `start` .. `end` - 1 of a sequence: what a step computes of it."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Case:
    """What the kernels are compiled for, and opened for."""

    dtype: torch.dtype = torch.bfloat16
    group: int = 2
    key_width: int = 128
    value_width: int = 128
    page: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_heads: int = 4

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def geometry(self) -> KvGeometry:
        return KvGeometry(1, self.kv_heads, self.key_width, self.value_width)

    def options(self) -> AttentionOptions:
        sinks = torch.linspace(-2, 6, self.heads, device="cuda") if self.sinks else None
        return AttentionOptions(self.key_width**-0.5, self.window, self.softcap, sinks)

    def open(
        self, name: str, pages: int, dtype: torch.dtype, deterministic: bool = False
    ) -> PagedAttention:
        setup = AttentionSetup(self.geometry, pages, self.page, dtype, "cuda", deterministic)
        return open_attention(name, setup)


class Sequences:
    """Sequences of random queries, keys and values; their pages are in random order."""

    def __init__(self, case: Case, lengths: list[int]) -> None:
        torch.manual_seed(sum(lengths))
        self.case = case
        self.lengths = lengths
        width = case.kv_heads * (case.key_width + case.value_width)
        self.rows = [self.random(length, width) for length in lengths]
        self.queries = [self.random(n, case.heads, case.key_width) for n in lengths]
        counts = [-(-length // case.page) for length in lengths]
        self.pages = sum(counts)
        self.tables: list[Tensor] = list(torch.randperm(self.pages, device="cuda").split(counts))
        self.slots = torch.randperm(len(lengths) + 3, device="cuda")[: len(lengths)]
        self.table = torch.zeros(
            len(lengths) + 3, max(counts) + 2, dtype=torch.int64, device="cuda"
        )
        for slot, pages in zip(self.slots.tolist(), self.tables, strict=True):
            self.table[slot, : len(pages)] = pages

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(self.case.dtype)

    def open(self, name: str, dtype: torch.dtype, deterministic: bool = False) -> PagedAttention:
        return self.case.open(name, self.pages, dtype, deterministic)

    def places(self, sequence: int, positions: Tensor) -> Tensor:
        page, table = self.case.page, self.tables[sequence]
        return table[positions // page] * page + positions % page

    def fill(self, pool: Tensor, rest: float) -> None:
        """Write every position of every sequence to its place, and `rest` to all other places."""
        pool.fill_(rest)
        for sequence, rows in enumerate(self.rows):
            positions = torch.arange(len(rows), device="cuda")
            pool[self.places(sequence, positions)] = rows.to(pool.dtype)

    def attend(self, attention: PagedAttention, decodes: list[Part], chunks: list[Part]) -> Tensor:
        """[tokens, heads, value_width] of one step. Query, keys and values are views of one row, as
        the decoder's are; keys of later positions than a part's are in the pool already.
        """
        parts, dtype = decodes + chunks, attention.pools[0].dtype
        heads = self.case.heads * self.case.key_width
        product = torch.cat(
            [
                torch.cat([self.queries[s][a:b].flatten(1), self.rows[s][a:b]], 1)
                for s, a, b in parts
            ]
        ).to(dtype)
        query = product[:, :heads].unflatten(1, (self.case.heads, -1))
        batch = self.batch(decodes, chunks)
        output: Tensor = query.new_full((*query.shape[:2], self.case.value_width), torch.nan)
        attention.attend(0, query, product[:, heads:], batch, self.case.options(), output)
        return output

    def batch(self, decodes: list[Part], chunks: list[Part]) -> ForwardBatch:
        parts = decodes + chunks
        ats = [(s, torch.arange(a, b, device="cuda")) for s, a, b in parts]
        spans, offset = [], len(decodes)
        for s, a, b in chunks:
            held = self.tables[s][: -(-b // self.case.page)]
            spans.append(PrefillSpan(offset, b - a, a, held))
            offset += b - a
        rows = DecodeRows(
            len(decodes),
            self.slots[[part.sequence for part in decodes]],
            torch.tensor([part.end for part in decodes], device="cuda"),
            self.table,
            self.table.shape[1],
        )
        return ForwardBatch(
            token_ids=torch.zeros(offset, dtype=torch.int64, device="cuda"),
            positions=torch.cat([at for _, at in ats]),
            write_at=torch.cat([self.places(s, at) for s, at in ats]),
            decodes=rows,
            spans=tuple(spans),
        )
