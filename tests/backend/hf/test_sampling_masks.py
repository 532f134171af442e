"""Rows that a grammar binds: what is drawn is what the plain sampler would draw of the allowed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.hf.sampling import Sampler, open_sampler
from backend.hf.sampling.masks import SLICE, forbid
from backend.hf.transfer import stacked
from backend.interface import TokenMask
from tests.backend.hf.test_sampling import (
    FIELDS,
    LARGE,
    assert_drawn_right,
    random_rows,
    sampler_of,
    setup_for,
)


def mask_of(allowed: set[int], vocabulary: int) -> TokenMask:
    mask = np.zeros(-(-vocabulary // 32), dtype=np.uint32)
    for id in allowed:
        mask[id // 32] |= np.uint32(1 << (id % 32))
    return mask.view(np.int32)


def only(row: list[float], allowed: set[int]) -> list[float]:
    return [logit if id in allowed else -math.inf for id, logit in enumerate(row)]


@pytest.mark.parametrize("rows", [1, SLICE, 2 * SLICE + 3])
@pytest.mark.parametrize("vocabulary", [31, 32, 300])
def test_what_is_not_in_the_mask_is_forbidden_and_the_rest_is_as_it_was(
    rows: int, vocabulary: int
) -> None:
    rng = random.Random(rows * vocabulary)
    sets = [set(rng.sample(range(vocabulary), 9)) for _ in range(rows)]
    logits = random_rows(rows, vocabulary)
    expected = [only(row, allowed) for row, allowed in zip(logits.tolist(), sets, strict=True)]
    forbid(logits, stacked([mask_of(allowed, vocabulary) for allowed in sets], logits.device))
    assert logits.tolist() == expected


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("field", FIELDS)
def test_a_bound_row_draws_what_the_plain_sampler_draws_of_the_allowed(
    field: str, graph: bool
) -> None:
    rng = random.Random(field)
    setups = [setup_for(slot, FIELDS[field]) for slot in range(6)]
    logits = random_rows(6, LARGE)
    before = logits.clone()
    allowed = {row: set(rng.sample(range(LARGE), 1 + 40 * row)) for row in (4, 0, 3)}
    masks = {row: mask_of(each, LARGE) for row, each in allowed.items()}
    slots, positions = list(range(6)), [100 + slot for slot in range(6)]
    bound, free = sampler_of(setups, LARGE), sampler_of(setups, LARGE)
    if graph:
        tokens = bound.draw(logits, torch.tensor(slots), torch.tensor(positions), slots)
        bound.redraw(logits, tokens, slots, positions, masks)
    else:
        tokens = bound.sample(logits, slots, positions, masks)
    assert torch.equal(logits, before)
    expected = free.sample(logits, slots, positions).tolist()
    for row, (token, setup) in enumerate(zip(tokens.tolist(), setups, strict=True)):
        if row in allowed:
            assert token in allowed[row]
            assert_drawn_right(token, only(logits[row].tolist(), allowed[row]), setup, 100 + row)
        else:
            assert token == expected[row]


def test_what_a_bound_row_drew_is_its_next_input_and_counts_for_its_penalties() -> None:
    setups = [setup_for(slot, FIELDS["presence, greedy"]) for slot in range(2)]
    states, sampler = open_sampler(2, LARGE, torch.device("cpu"))
    states.take(setups)
    logits = random_rows(2, LARGE)
    masks = {1: mask_of({200, 201}, LARGE)}
    tokens = sampler.draw(logits, torch.tensor([0, 1]), torch.tensor([9, 9]), [0, 1])
    sampler.redraw(logits, tokens, [0, 1], [9, 9], masks)
    first = int(tokens[1])
    assert states.last_token[:2].tolist() == tokens.tolist()
    # a presence penalty of -2 lifts what was drawn by 2 and nothing else
    level = torch.zeros(2, LARGE)
    level[1, 401 - first] = 1.0
    again = sampler.sample(level, [0, 1], [10, 10], masks)
    assert int(again[1]) == first


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [False, True])
def test_a_cuda_device_draws_of_bound_rows_what_it_draws_of_the_allowed(kernels: bool) -> None:
    rng = random.Random(7)
    setups = [setup_for(slot, sampling) for slot, sampling in enumerate(FIELDS.values())]
    slots = list(range(len(setups)))
    logits = random_rows(len(setups), LARGE)
    allowed = {row: set(rng.sample(range(LARGE), 30)) for row in slots[::2]}
    masks = {row: mask_of(each, LARGE) for row, each in allowed.items()}
    rest = [
        only(row, allowed[index]) if index in allowed else row
        for index, row in enumerate(logits.tolist())
    ]

    def drawn(given: Tensor, masks: Mapping[int, TokenMask]) -> list[list[int]]:
        states, sampler = open_sampler(len(setups), LARGE, "cuda", kernels)
        states.take(setups)
        return [_step(sampler, given.to("cuda"), slots, masks, at) for at in (50, 51)]

    assert drawn(logits, masks) == drawn(torch.tensor(rest), {})


def _step(
    sampler: Sampler, logits: Tensor, slots: list[int], masks: Mapping[int, TokenMask], at: int
) -> list[int]:
    """A step as a graph has it: all are drawn, and then again those that are bound or edited."""
    positions = [at] * len(slots)
    sent = torch.tensor([slots, positions], device=logits.device)
    tokens = sampler.draw(logits, sent[0], sent[1], slots)
    sampler.redraw(logits, tokens, slots, positions, masks)
    found: list[int] = tokens.tolist()
    return found
