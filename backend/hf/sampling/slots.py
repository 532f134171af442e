"""What each slot asked for.

Owned by the executor. What a draw needs lies on the device, indexed by slot, set when the slot is
taken; the host keeps the setups, to know without a look at the device which work a step needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backend.hf.sampling.draw import as_share
from backend.hf.sampling.edits import SlotEdits
from backend.hf.sampling.penalties import PenaltyTables
from backend.hf.transfer import to_device
from backend.interface import SamplingParams, SlotSetup

SETTINGS = 5  # columns of `SlotStates.settings`


class SlotStates:
    """Sampling state of `max_running` slots on `device`.

    The spare slot behind them is never taken: padding rows of a graph stand there, and are greedy.
    """

    last_token: Tensor  # [max_running + 1] int64: the latest draw of each slot
    settings: Tensor  # [max_running + 1, SETTINGS] int64: float32 bits of the temperature (0:
    # greedy), top_k (0: all), shares of top_p and min_p (see `as_share`), seed
    setups: dict[int, SlotSetup]  # of slots that were taken
    edits: dict[int, SlotEdits]  # of those that may edit their logits before a draw
    takings: int  # how often slots were taken: what was derived before is stale after

    def __init__(self, max_running: int, vocabulary: int, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.device = device
        self.last_token = torch.zeros(max_running + 1, dtype=torch.int64, device=device)
        self.settings = torch.zeros(max_running + 1, SETTINGS, dtype=torch.int64, device=device)
        self.setups = {}
        self.edits = {}
        self.takings = 0
        self._penalties: PenaltyTables | None = None

    @property
    def penalties(self) -> PenaltyTables:
        """Made when a request asks for the first time."""
        if self._penalties is None:
            self._penalties = PenaltyTables(len(self.last_token), self.vocabulary, self.device)
        return self._penalties

    def take(self, setups: Sequence[SlotSetup]) -> None:
        """Give slots, each there once, to sequences, new or come back: nothing of the ones before
        is left.
        """
        if not setups:
            return
        self.takings += 1
        for setup in setups:
            self.setups[setup.slot] = setup
            edits = SlotEdits.of(setup)
            if edits is None:
                self.edits.pop(setup.slot, None)
            else:
                self.edits[setup.slot] = edits
        rows = [[setup.slot, *self._settings_of(setup.sampling), setup.seed] for setup in setups]
        sent = to_device(rows, self.device)
        self.settings.index_copy_(0, sent[:, 0], sent[:, 1:])
        penalised = [setup for setup in setups if setup.sampling.penalised]
        if penalised:
            self.penalties.fill(penalised)

    def _settings_of(self, sampling: SamplingParams) -> tuple[int, int, int, int]:
        if not sampling.temperature:
            return 0, 0, 0, 0
        # a temperature that float32 rounds to 0 would make 0 / 0
        temperature = np.float32(max(sampling.temperature, torch.finfo(torch.float32).tiny))
        return (
            int(temperature.view(np.int32)),
            sampling.top_k if sampling.top_k < self.vocabulary else 0,
            as_share(sampling.top_p),
            as_share(sampling.min_p),
        )
