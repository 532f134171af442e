"""`step_inputs` against a loop over rows."""

from __future__ import annotations

import random
from importlib import import_module

import pytest
import torch

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SLOTS, MAX_PAGES = 301, 37


@pytest.mark.parametrize("page_tokens", [1, 16, 48])
@pytest.mark.parametrize("rows", [1, 3, 128, 300])
def test_rows_read_what_their_slots_hold(rows: int, page_tokens: int) -> None:
    rng = random.Random(rows * page_tokens)
    last_token = [rng.randrange(150_000) for _ in range(SLOTS)]
    table = [[rng.randrange(1 << 40) for _ in range(MAX_PAGES)] for _ in range(SLOTS)]
    slots = [rng.randrange(SLOTS) for _ in range(rows)]
    positions = [rng.randrange(MAX_PAGES * page_tokens) for _ in range(rows)]
    right = [
        (last_token[slot], table[slot][at // page_tokens] * page_tokens + at % page_tokens, at + 1)
        for slot, at in zip(slots, positions, strict=True)
    ]
    # as parts of a larger tensor, and so at any alignment
    sent = torch.tensor([-1, *slots, *positions, -1], device=DEVICE)
    found = import_module("backend.hf.kernels.step_inputs").step_inputs(
        sent[1 : rows + 1],
        sent[rows + 1 : -1],
        torch.tensor(last_token, device=DEVICE),
        torch.tensor(table, device=DEVICE),
        page_tokens,
    )
    assert torch.stack(found, dim=1).tolist() == [list(row) for row in right]
