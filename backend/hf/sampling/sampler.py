"""From logits to tokens, for all rows of a step at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from backend.hf.sampling.draw import draw, uniform
from backend.hf.sampling.slots import Floor, RowPlan, SlotStates


class Sampler:
    """Draws the next token of each row and advances its slot. One owner: the executor."""

    def __init__(self, states: SlotStates) -> None:
        self._states = states

    def sample(self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Tokens [rows] int64 for `logits` [rows, vocabulary] float32: row i belongs to
        `slots[i]`, each there once, and is the token at `positions[i]`.

        Edits the rows with penalties, biases or a minimum length in place. The order of operations
        is that of `SamplingParams`. A row that asks for nothing is its argmax, the lowest id of a
        tie.
        """
        plan = self._states.plan(tuple(slots))
        self._edit(logits, plan, positions)
        tokens = _choose(logits, plan, positions)
        self._advance(plan, tokens)
        return tokens

    def _edit(self, logits: Tensor, plan: RowPlan, positions: Sequence[int]) -> None:
        if plan.penalised is not None:
            self._states.penalties.apply(logits, plan.penalised)
        if plan.biases is not None:
            where = (plan.biases.rows, plan.biases.tokens)
            logits.index_put_(where, plan.biases.values, accumulate=True)
        early = [floor for floor in plan.floors if positions[floor.row] < floor.min_position]
        if early:
            _forbid_stopping(logits, early)

    def _advance(self, plan: RowPlan, tokens: Tensor) -> None:
        self._states.last_token.index_copy_(0, plan.slots, tokens)
        if plan.penalised is not None:
            self._states.penalties.advance(plan.penalised, tokens[plan.penalised.rows])


def _choose(logits: Tensor, plan: RowPlan, positions: Sequence[int]) -> Tensor:
    if not plan.groups:
        return logits.argmax(-1)
    tokens = logits.argmax(-1) if plan.greedy else torch.empty_like(plan.slots)
    drawn = torch.tensor(positions, dtype=torch.int64, device=logits.device)
    for group in plan.groups:
        share = uniform(group.params.seed, drawn[group.rows])
        tokens[group.rows] = draw(logits[group.rows], group.params, share, group.filters)
    return tokens


def _forbid_stopping(logits: Tensor, floors: Sequence[Floor]) -> None:
    pairs = [(floor.row, token) for floor in floors for token in floor.stop_ids]
    rows, tokens = torch.tensor(pairs, dtype=torch.int64, device=logits.device).unbind(-1)
    logits[rows, tokens] = -math.inf
