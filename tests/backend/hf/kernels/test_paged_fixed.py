"""DETERMINISTIC attention: right, and bitwise the same however a position comes to be computed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backend.hf.attention import PagedAttention
from tests.backend.hf.kernels.paged_sequences import Case, Part, Sequences

pytestmark = pytest.mark.gpu

MOST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of values in +-5
LENGTHS = [3000, 1, 1024, 1025, 200, 2500, 64, 65]
CASES = {
    "bf16": Case(),
    "fp32": Case(dtype=torch.float32),
    "group 3, width 80": Case(group=3, key_width=80, value_width=80),
    "wide": Case(key_width=256, value_width=256, kv_heads=2),
    "all": Case(window=700, softcap=2.0, sinks=True),
    "all in fp32": Case(torch.float32, window=1500, softcap=2.0, sinks=True, page=4),
}


def rows_of(
    sequences: Sequences, attention: PagedAttention, decodes: list[Part], chunks: list[Part]
) -> dict[tuple[int, int], Tensor]:
    """Output rows of a step by sequence and position."""
    output = sequences.attend(attention, decodes, chunks)
    cells = [(s, at) for s, start, end in decodes + chunks for at in range(start, end)]
    return dict(zip(cells, output, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_row_has_the_same_bits_as_a_decode_and_in_any_chunk_and_batch(name: str) -> None:
    rng = random.Random(name)
    sequences = Sequences(CASES[name], LENGTHS)
    attention = sequences.open("triton", sequences.case.dtype, deterministic=True)
    sequences.fill(attention.pools[0], torch.nan)
    whole = rows_of(sequences, attention, [], [Part(s, 0, n) for s, n in enumerate(LENGTHS)])
    reference = sequences.open("sdpa", torch.float32)
    sequences.fill(reference.pools[0], 0.0)
    right = rows_of(sequences, reference, [], [Part(s, 0, n) for s, n in enumerate(LENGTHS)])
    for cell, row in right.items():
        assert (whole[cell].float() - row).abs().max() < MOST_ERROR[sequences.case.dtype]
    for _ in range(6):
        order = rng.sample(range(len(LENGTHS)), rng.randint(1, len(LENGTHS)))
        cut = rng.randint(0, len(order))
        ends = [rng.randint(1, LENGTHS[s]) for s in order]
        parts = [Part(s, rng.randrange(end), end) for s, end in zip(order, ends, strict=True)]
        decodes = [Part(s, end - 1, end) for s, _, end in parts[:cut]]
        found = rows_of(sequences, attention, decodes, parts[cut:])
        assert all(torch.equal(row, whole[cell]) for cell, row in found.items())


def test_a_graph_of_decodes_has_the_bits_of_chunks_at_every_length() -> None:
    sequences = Sequences(replace(Case(), window=1500, sinks=True), LENGTHS)
    attention = sequences.open("triton", torch.bfloat16, deterministic=True)
    sequences.fill(attention.pools[0], torch.nan)
    batch = sequences.batch([Part(0, at, at + 1) for at in range(4)], [])
    query = torch.empty(4, 8, 128, device="cuda").bfloat16()
    kv = torch.zeros(4, 1024, device="cuda").bfloat16()

    def attend() -> Tensor:
        output = torch.empty_like(query)
        attention.attend(0, query, kv, batch, sequences.case.options(), output)
        return output

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend()
    whole = sequences.attend(attention, [], [Part(0, 0, 3000)])
    for now in ([1, 64, 1024, 1025], [3000, 2999, 2, 65], [2048, 2049, 1500, 1501]):
        batch.decodes.lengths.copy_(torch.tensor(now))
        query.copy_(sequences.queries[0][[length - 1 for length in now]])
        graph.replay()
        assert torch.equal(output, whole[[length - 1 for length in now]])
