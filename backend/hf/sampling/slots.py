"""What each slot asked for, and which rows of a step ask for what.

Owned by the executor. Numbers lie on the device, indexed by slot, set when the slot is taken; the
host keeps the setups, to know without a look at the device which work a step needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.hf.sampling.draw import DrawParams, Filters, as_share
from backend.hf.sampling.penalties import PenalisedRows, PenaltyTables
from backend.interface import SlotSetup


@dataclass(frozen=True, slots=True)
class DrawGroup:
    """Rows that are drawn alike."""

    rows: Tensor | slice  # [group] int64; a slice when it is every row
    params: DrawParams
    filters: Filters


@dataclass(frozen=True, slots=True)
class Biases:
    """What is added to logits, as coordinates: one entry for each (row, token)."""

    rows: Tensor  # [entries] int64
    tokens: Tensor  # [entries] int64
    values: Tensor  # [entries] float32


@dataclass(frozen=True, slots=True)
class Floor:
    """A row that may not stop yet."""

    row: int
    min_position: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which rows of a batch ask for what. Holds until one of its slots is taken anew."""

    slots: Tensor  # [rows] int64
    greedy: bool  # some row takes the most probable token
    groups: tuple[DrawGroup, ...]
    penalised: PenalisedRows | None
    biases: Biases | None
    floors: tuple[Floor, ...]


class SlotStates:
    """Sampling state of `max_running` slots on `device`."""

    def __init__(self, max_running: int, vocabulary: int, device: torch.device) -> None:
        self.last_token = torch.zeros(max_running + 1, dtype=torch.int64, device=device)
        self._vocabulary = vocabulary
        self._temperature = torch.ones(max_running, device=device)
        self._draws = torch.zeros(max_running, 4, dtype=torch.int64, device=device)
        self._penalties: PenaltyTables | None = None
        self._setups: dict[int, SlotSetup] = {}
        self._latest: tuple[tuple[int, ...], RowPlan] | None = None

    @property
    def penalties(self) -> PenaltyTables:
        """Made when a request asks for the first time."""
        if self._penalties is None:
            self._penalties = PenaltyTables(
                len(self.last_token), self._vocabulary, self.last_token.device
            )
        return self._penalties

    def take(self, setup: SlotSetup) -> None:
        """Give the slot to a sequence, new or come back: nothing of the one before is left."""
        self._setups[setup.slot] = setup
        self._latest = None
        sampling = setup.sampling
        if sampling.temperature:
            # a temperature that float32 rounds to 0 would make 0 / 0
            self._temperature[setup.slot] = max(
                sampling.temperature, torch.finfo(torch.float32).tiny
            )
            top_k = min(sampling.top_k, self._vocabulary)
            shares = as_share(sampling.top_p), as_share(sampling.min_p)
            self._draws[setup.slot] = torch.tensor([top_k, *shares, setup.seed])
        if sampling.penalised:
            self.penalties.fill(setup)

    def plan(self, slots: tuple[int, ...]) -> RowPlan:
        """Who asks for what among `slots`, the rows of a batch in order.

        Made anew only when the rows have changed.
        """
        if self._latest is None or self._latest[0] != slots:
            self._latest = slots, self._plan([self._setups[slot] for slot in slots])
        return self._latest[1]

    def _plan(self, setups: list[SlotSetup]) -> RowPlan:
        return RowPlan(
            slots=self._ids([setup.slot for setup in setups]),
            greedy=any(not setup.sampling.temperature for setup in setups),
            groups=self._groups(setups),
            penalised=self._penalised(setups),
            biases=self._biases(setups),
            floors=tuple(
                Floor(row, setup.min_position, setup.stop_ids)
                for row, setup in enumerate(setups)
                if setup.min_position and setup.stop_ids
            ),
        )

    def _groups(self, setups: list[SlotSetup]) -> tuple[DrawGroup, ...]:
        members: dict[Filters, list[int]] = {}
        for row, setup in enumerate(setups):
            sampling = setup.sampling
            if sampling.temperature:
                filters = Filters(
                    top_k=0 < sampling.top_k < self._vocabulary,
                    top_p=sampling.top_p < 1,
                    min_p=sampling.min_p > 0,
                )
                members.setdefault(filters, []).append(row)
        return tuple(
            DrawGroup(
                slice(None) if len(rows) == len(setups) else self._ids(rows),
                self._params(self._ids([setups[row].slot for row in rows])),
                filters,
            )
            for filters, rows in members.items()
        )

    def _params(self, slots: Tensor) -> DrawParams:
        top_k, top_p, min_p, seed = self._draws[slots].unbind(-1)
        return DrawParams(self._temperature[slots], top_k, top_p, min_p, seed)

    def _penalised(self, setups: list[SlotSetup]) -> PenalisedRows | None:
        rows = [row for row, setup in enumerate(setups) if setup.sampling.penalised]
        slots = [setups[row].slot for row in rows]
        return PenalisedRows(self._ids(rows), self._ids(slots), tuple(slots)) if rows else None

    def _biases(self, setups: list[SlotSetup]) -> Biases | None:
        entries = [
            (row, token, value)
            for row, setup in enumerate(setups)
            for token, value in setup.sampling.logit_bias
        ]
        if not entries:
            return None
        rows, tokens, values = zip(*entries, strict=True)
        return Biases(
            self._ids(list(rows)),
            self._ids(list(tokens)),
            torch.tensor(values, dtype=torch.float32, device=self.last_token.device),
        )

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.last_token.device)
