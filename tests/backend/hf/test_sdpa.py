"""Attention over pages against dense attention in float64, one query at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.hf.attention import AttentionOptions, AttentionSetup, KvGeometry
from backend.hf.attention.sdpa import GATHERED_TOKENS, SdpaAttention
from backend.hf.batch import DecodeRows, ForwardBatch, PrefillSpan

PAGE = 4
GEOMETRY = KvGeometry(layers=1, kv_heads=2, key_width=8, value_width=6)
HEADS = 6
OPTIONS = {
    "plain": AttentionOptions(scale=0.3),
    "window": AttentionOptions(scale=0.3, window=7),
    "softcap": AttentionOptions(scale=0.9, softcap=2.0),
    "sinks": AttentionOptions(scale=0.3, sinks=torch.linspace(-2, 2, HEADS)),
    "all": AttentionOptions(scale=0.9, window=5, softcap=2.0, sinks=torch.ones(HEADS)),
}


class Sequences:
    """Keys and values of some sequences, written through pages in random order."""

    def __init__(self, lengths: list[int]) -> None:
        torch.manual_seed(sum(lengths))
        self.rows = [torch.randn(length, GEOMETRY.row) for length in lengths]
        pages = [-(-length // PAGE) for length in lengths]
        self.count = sum(pages)
        free = torch.randperm(self.count)
        self.tables: list[Tensor] = list(free.split(pages))
        self.attention = SdpaAttention(
            AttentionSetup(GEOMETRY, self.count, PAGE, torch.float32, "cpu")
        )

    def places(self, sequence: int, positions: Tensor) -> Tensor:
        return self.tables[sequence][positions // PAGE] * PAGE + positions % PAGE

    def attend(
        self, decodes: list[int], chunks: list[tuple[int, int]], options: AttentionOptions
    ) -> tuple[Tensor, Tensor]:
        """Decode the last position of `decodes`, and the positions from `start` on of each chunk.

        Returns what came, and what is right.
        """
        parts = [(s, torch.tensor([len(self.rows[s]) - 1])) for s in decodes]
        parts += [(s, torch.arange(start, len(self.rows[s]))) for s, start in chunks]
        pool = self.attention.pools[0]
        for s, positions in parts:  # what came before stands there already
            before = torch.arange(int(positions[0]))
            pool[self.places(s, before)] = self.rows[s][before]
        query = torch.randn(sum(len(positions) for _, positions in parts), HEADS, 8)
        batch = self.batch(parts, len(decodes))
        kv = torch.cat([self.rows[s][positions] for s, positions in parts])
        pool.index_copy_(0, batch.write_at, kv)
        got = torch.full((*query.shape[:2], GEOMETRY.value_width), torch.nan)
        self.attention.attend(0, query, kv, batch, options, got)
        owners = [(s, int(position)) for s, positions in parts for position in positions]
        right = [
            dense(one, self.rows[s][: position + 1], options)
            for one, (s, position) in zip(query, owners, strict=True)
        ]
        return got, torch.stack(right)

    def batch(self, parts: list[tuple[int, Tensor]], decodes: int) -> ForwardBatch:
        lengths = torch.tensor([len(self.rows[s]) for s, _ in parts[:decodes]], dtype=torch.int64)
        tables = torch.zeros(decodes, self.count, dtype=torch.int64)
        for row, (s, _) in enumerate(parts[:decodes]):
            tables[row, : len(self.tables[s])] = self.tables[s]
        spans, offset = [], decodes
        for s, positions in parts[decodes:]:
            spans.append(PrefillSpan(offset, len(positions), int(positions[0]), self.tables[s]))
            offset += len(positions)
        return ForwardBatch(
            token_ids=torch.zeros(offset, dtype=torch.int64),
            positions=torch.cat([positions for _, positions in parts]),
            write_at=torch.cat([self.places(s, positions) for s, positions in parts]),
            decodes=DecodeRows(decodes, torch.arange(decodes), lengths, tables, tables.shape[1]),
            spans=tuple(spans),
        )


def dense(query: Tensor, rows: Tensor, options: AttentionOptions) -> Tensor:
    """query [heads, key_width] over all of `rows` [positions, row]; [heads, value_width]."""
    split = GEOMETRY.kv_heads * GEOMETRY.key_width
    rows = rows[-options.window :] if options.window else rows
    found = []
    for head, one in enumerate(query.double()):
        kv_head = head // (HEADS // GEOMETRY.kv_heads)
        keys = rows[:, :split].view(-1, GEOMETRY.kv_heads, 8)[:, kv_head].double()
        values = rows[:, split:].view(-1, GEOMETRY.kv_heads, 6)[:, kv_head].double()
        scores = keys @ one * options.scale
        if options.softcap:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.sinks is not None:
            scores = torch.cat([scores, options.sinks[head : head + 1].double()])
        found.append(scores.softmax(0)[: len(values)] @ values)
    return torch.stack(found).float()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_mixed_batch_attends_as_dense_attention_does(name: str) -> None:
    sequences = Sequences([1, 3, 4, 5, 17, 40, 41, 64, 9, 33])
    decodes, chunks = [0, 1, 2, 3, 4, 5, 6, 7], [(8, 0), (9, 20)]
    got, right = sequences.attend(decodes, chunks, OPTIONS[name])
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_decodes_or_chunks_alone_attend_as_dense_attention_does() -> None:
    sequences = Sequences([30, 31, 12])
    for decodes, chunks in (([0, 1], []), ([], [(2, 0)]), ([], [(2, 5), (1, 0)])):
        got, right = sequences.attend(decodes, chunks, OPTIONS["plain"])
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_one_long_row_does_not_make_the_others_gather_its_length() -> None:
    longest = GATHERED_TOKENS // 8
    sequences = Sequences([longest] + [20] * 15)
    got, right = sequences.attend(list(range(16)), [], OPTIONS["plain"])
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert sequences.attention._gathered.numel() == longest * GEOMETRY.row


def test_many_long_rows_are_gathered_in_bounded_pieces() -> None:
    rows, length = 20, GATHERED_TOKENS // 16
    sequences = Sequences([length] * rows)
    got, right = sequences.attend(list(range(rows)), [], OPTIONS["plain"])
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert sequences.attention._gathered.numel() <= GATHERED_TOKENS * GEOMETRY.row
