"""The draw by our Triton kernels: two launches that a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backend.hf.kernels.chip import hopper_or_later
from backend.hf.kernels.draw import settle_kernel, survey_kernel
from backend.hf.kernels.mask_rows import mask_rows
from backend.hf.sampling.slots import SlotStates

CHUNK = 128  # tokens with a maximum of their own, for rows with top_k
LISTED = 512  # chunks that may hold the most probable tokens; a row with more is read whole
FOUND = 1024  # tokens that may be among the most probable; likewise


class Survey(NamedTuple):
    """How many logits a program reads, and how many warps it has."""

    block: int
    warps: int


class Settlement(NamedTuple):
    """How a row is settled where it is read again: tokens at a time, and loads in flight."""

    block: int
    stages: int
    warps: int
    registers: int  # of a thread: so few that two programs share a multiprocessor


# by rows at most: small blocks spread few rows over the chip
SURVEYS: tuple[tuple[float, Survey], ...] = (
    (4, Survey(1024, 4)),
    (32, Survey(2048, 4)),
    (float("inf"), Survey(4096, 8)),
)
SETTLEMENT = Settlement(2048, 6, warps=16, registers=64)


class TritonDraw:
    """A `Draw` for CUDA devices of compute capability 8.0 or later."""

    def __init__(self, states: SlotStates) -> None:
        self._states = states
        self._overlapped = hopper_or_later(states.device)

    def __call__(
        self, logits: Tensor, slots: Tensor, positions: Tensor, on_host: Sequence[int]
    ) -> Tensor:
        """See `Draw`. The logits of a row are contiguous; `on_host` is not read."""
        rows, vocabulary = logits.shape
        survey = next(survey for most, survey in SURVEYS if rows <= most)
        splits, chunks = -(-vocabulary // survey.block), -(-vocabulary // CHUNK)
        tokens = torch.empty_like(slots)
        scores, peaks, maxima, found = (
            torch.empty(rows, width, device=logits.device)
            for width in (splits, splits, chunks, FOUND)
        )
        named, listed, found_names = (
            torch.empty(rows, width, dtype=torch.int32, device=logits.device)
            for width in (splits, LISTED, FOUND)
        )
        given = (logits, self._states.settings, slots, positions, scores, named, peaks, maxima)
        survey_kernel[splits, rows](
            *given, logits.stride(0), vocabulary, chunks,
            survey.block, CHUNK, self._overlapped, num_warps=survey.warps,
            launch_pdl=self._overlapped,
        )  # fmt: skip
        settle_kernel[(rows,)](
            *given, listed, found, found_names, tokens, self._states.last_token,
            logits.stride(0), vocabulary, splits, chunks, 1 << (splits - 1).bit_length(),
            1 << (chunks - 1).bit_length(), CHUNK, LISTED, FOUND,
            SETTLEMENT.block, SETTLEMENT.stages, self._overlapped,
            num_warps=SETTLEMENT.warps, maxnreg=SETTLEMENT.registers,
            launch_pdl=self._overlapped,
        )  # fmt: skip
        return tokens

    def copies(self, logits: Tensor, rows: Tensor, masks: Tensor | None) -> Tensor:
        """See `Draw`."""
        return logits.index_select(0, rows) if masks is None else mask_rows(logits, rows, masks)
