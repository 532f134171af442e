"""Prompts as vectors: sums of final hidden states, for chunks that ask for them.

Called by the executor in a step that holds prompts. Sums are of one chunk, in float32; the sequence
adds them up, so that the vector of a prompt does not depend on how it was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backend.hf.transfer import to_host
from backend.interface import Chunk, Pooling

SUMS: dict[Pooling, Callable[[Tensor], Tensor]] = {  # [positions, hidden] to [hidden]
    "mean": lambda rows: rows.sum(0, dtype=torch.float32),
    "last": lambda rows: rows[-1].float(),
}


def pool(chunks: Sequence[Chunk], hidden: Tensor) -> dict[int, Tensor]:
    """For the index of each chunk that asks, its sum [hidden], on its way to the host.

    `hidden` [tokens, hidden] holds the chunks' positions one after the other.
    """
    pooled = {}
    end = 0
    for index, chunk in enumerate(chunks):
        start, end = end, end + chunk.count
        if chunk.pools is not None:
            pooled[index] = to_host(SUMS[chunk.pools](hidden[start:end]))
    return pooled
