"""The draw by torch operations alone: groups of rows that are drawn alike, by inverse CDF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.hf.sampling.draw import DrawParams, Filters, draw, uniform
from backend.hf.sampling.masks import copy_rows
from backend.hf.sampling.slots import SlotStates
from backend.hf.transfer import to_device
from backend.interface import SamplingParams


@dataclass(frozen=True, eq=False, slots=True)
class DrawGroup:
    """Rows that are drawn alike."""

    rows: Tensor | slice  # [group] int64; a slice when it is every row
    params: DrawParams
    filters: Filters


@dataclass(frozen=True, eq=False, slots=True)
class RowPlan:
    """Which rows of a batch are drawn how."""

    slots: tuple[int, ...]
    takings: int  # of the slots, when this was made
    greedy: bool  # some row takes the most probable token
    groups: tuple[DrawGroup, ...]


class TorchDraw:
    """A `Draw` for any device. Made for the CPU: elsewhere it may wait for the device."""

    def __init__(self, states: SlotStates) -> None:
        self._states = states
        self._latest: RowPlan | None = None

    def __call__(
        self, logits: Tensor, slots: Tensor, positions: Tensor, on_host: Sequence[int]
    ) -> Tensor:
        """See `Draw`."""
        tokens = _choose(logits, self._plan(tuple(on_host)), positions)
        self._states.last_token.index_copy_(0, slots, tokens)
        return tokens

    def copies(self, logits: Tensor, rows: Tensor, masks: Tensor | None) -> Tensor:
        """See `Draw`."""
        return copy_rows(logits, rows, masks)

    def _plan(self, slots: tuple[int, ...]) -> RowPlan:
        """Made anew only when the rows have changed."""
        plan = self._latest
        if plan is None or plan.slots != slots or plan.takings != self._states.takings:
            plan = self._latest = self._group(slots)
        return plan

    def _group(self, slots: tuple[int, ...]) -> RowPlan:
        members: dict[Filters, list[int]] = {}
        for row, slot in enumerate(slots):
            setup = self._states.setups.get(slot)  # None: the spare slot
            if setup is not None and setup.sampling.temperature:
                members.setdefault(self._filters(setup.sampling), []).append(row)
        drawn = sum(map(len, members.values()))
        groups = tuple(
            DrawGroup(
                slice(None) if len(rows) == len(slots) else self._ids(rows),
                self._params([slots[row] for row in rows]),
                filters,
            )
            for filters, rows in members.items()
        )
        return RowPlan(slots, self._states.takings, drawn < len(slots), groups)

    def _filters(self, sampling: SamplingParams) -> Filters:
        return Filters(
            top_k=0 < sampling.top_k < self._states.vocabulary,
            top_p=sampling.top_p < 1,
            min_p=sampling.min_p > 0,
        )

    def _params(self, slots: list[int]) -> DrawParams:
        settings = self._states.settings.index_select(0, self._ids(slots))
        temperature, top_k, top_p, min_p, seed = settings.unbind(-1)
        return DrawParams(temperature.int().view(torch.float32), top_k, top_p, min_p, seed)

    def _ids(self, values: list[int]) -> Tensor:
        return to_device(values, self._states.device)


def _choose(logits: Tensor, plan: RowPlan, positions: Tensor) -> Tensor:
    if not plan.groups:
        return logits.argmax(-1)
    tokens = logits.argmax(-1) if plan.greedy else torch.empty_like(positions)
    for group in plan.groups:
        share = uniform(group.params.seed, positions[group.rows])
        tokens[group.rows] = draw(logits[group.rows], group.params, share, group.filters)
    return tokens
