"""From logits to tokens, for all rows of a step at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from backend.hf.sampling.edits import RowEdits, edits_of
from backend.hf.sampling.slots import SlotStates
from backend.hf.sampling.torch_draw import TorchDraw
from backend.hf.transfer import to_device
from backend.interface import TokenMask

logger = logging.getLogger(__name__)

NO_MASKS: Mapping[int, TokenMask] = MappingProxyType({})


class Draw(Protocol):
    """Draws one token a row by the settings of its slot, and leaves it in `last_token`.

    A token is a pure function of (its row of logits, settings, position), in any company. A row
    that asks for nothing is its argmax, the lowest id of a tie; a row of NaN or of -inf alone is
    some id.
    """

    def __call__(
        self, logits: Tensor, slots: Tensor, positions: Tensor, on_host: Sequence[int]
    ) -> Tensor:
        """The arguments and the result are those of `Sampler.draw`."""

    def copies(self, logits: Tensor, rows: Tensor, masks: Tensor | None) -> Tensor:
        """Copies [rows, vocabulary] of `rows` [rows] int64 of `logits`, to be edited. The first of
        them keep what `masks` [masked, words] int32 allow, see `TokenMask`; the rest is -inf.
        """


class Sampler:
    """Draws the next token of each row and advances its slot. One owner: the executor.

    The order of operations is that of `SamplingParams`.
    """

    def __init__(self, states: SlotStates, draw: Draw) -> None:
        self._states = states
        self._draw = draw

    def draw(
        self, logits: Tensor, slots: Tensor, positions: Tensor, on_host: Sequence[int]
    ) -> Tensor:
        """Tokens [rows] int64 for raw `logits` [rows, vocabulary] float32, which stay as they are:
        row i belongs to `slots[i]` (int64), each there once but the spare one, and is the token at
        `positions[i]` (int64). Edits nothing: see `redraw`.

        `on_host` are the slots again. Our kernels do not read it, so that a graph may hold this
        call.
        """
        return self._draw(logits, slots, positions, on_host)

    def draw_bound(self, logits: Tensor, slots: Tensor, positions: Tensor, masks: Tensor) -> Tensor:
        """`draw` of rows that are bound by `masks` [rows, words] int32. For a graph."""
        rows = torch.arange(len(logits), device=logits.device)
        return self._draw(self._draw.copies(logits, rows, masks), slots, positions, ())

    def redraw(
        self,
        logits: Tensor,
        tokens: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        masks: Mapping[int, TokenMask] = NO_MASKS,
    ) -> None:
        """Draw again, into `tokens` and `last_token`, the rows that edit their logits first:
        masks, penalties, bias, minimum length. Copies those rows, and costs nothing when there are
        none.

        The arguments are those of `draw`, and its result, with the masks of rows that a grammar
        binds; once a step.
        """
        edits = self._edits(slots, positions, masks)
        if edits is not None:
            self._draw_edited(logits, tokens, edits)

    def edited(
        self, slots: Sequence[int], masks: Mapping[int, TokenMask]
    ) -> Mapping[int, TokenMask]:
        """Those of `masks` whose rows may edit their logits otherwise, too."""
        return {row: mask for row, mask in masks.items() if slots[row] in self._states.edits}

    def sample(
        self,
        logits: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        masks: Mapping[int, TokenMask] = NO_MASKS,
    ) -> Tensor:
        """`draw` and `redraw` in one, with each row drawn once: for a step outside a graph."""
        device = self._states.device
        edits = self._edits(slots, positions, masks)
        if edits is None:
            sent = to_device([slots, positions], device)
            return self._draw(logits, sent[0], sent[1], slots)
        tokens = torch.empty(len(slots), dtype=torch.int64, device=device)
        self._draw_edited(logits, tokens, edits)
        edited = set(edits.on_host)
        rest = [row for row, slot in enumerate(slots) if slot not in edited]
        if rest:
            own = [slots[row] for row in rest]
            sent = to_device([rest, own, [positions[row] for row in rest]], device)
            drawn = self._draw(logits.index_select(0, sent[0]), sent[1], sent[2], own)
            tokens.index_copy_(0, sent[0], drawn)
        return tokens

    def _edits(
        self, slots: Sequence[int], positions: Sequence[int], masks: Mapping[int, TokenMask]
    ) -> RowEdits | None:
        states = self._states
        return edits_of(states.edits, slots, positions, masks, states.vocabulary, states.device)

    def _draw_edited(self, logits: Tensor, tokens: Tensor, edits: RowEdits) -> None:
        states = self._states
        edited = self._draw.copies(logits, edits.rows, edits.masks)
        if edits.penalised is not None:
            states.penalties.apply(edited, edits.penalised)
        edits.apply(edited)
        drawn = self._draw(edited, edits.slots, edits.positions, edits.on_host)
        tokens.index_copy_(0, edits.rows, drawn)
        if edits.penalised is not None:
            states.penalties.advance(edits.penalised, drawn[edits.penalised.rows])


def open_sampler(
    max_running: int, vocabulary: int, device: torch.device | str, kernels: bool = False
) -> tuple[SlotStates, Sampler]:
    """The state of `max_running` slots on `device` and the sampler that works on it.
    `kernels`: ours run on this device.
    """
    states = SlotStates(max_running, vocabulary, torch.device(device))
    return states, Sampler(states, _open_draw(states, kernels))


def _open_draw(states: SlotStates, kernels: bool) -> Draw:
    if not kernels:
        if states.device.type == "cuda":
            logger.warning("our kernels do not run on this device: draws wait for it")
        return TorchDraw(states)
    from backend.hf.sampling.triton_draw import TritonDraw  # triton is there with CUDA only

    return TritonDraw(states)
