"""One step as tensors: what the model and its attention read during a forward pass.

Dies with the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class DecodeRows:
    """The decodes of a step: one query token a row, the first tokens of the batch.

    A padding row of a graph stands in a slot of its own, whose table holds the spare page, and has
    length 1.
    """

    count: int
    slots: Tensor  # [count] int64
    lengths: Tensor  # [count] int64: positions a row attends to, its own included
    table: Tensor  # [slots, max_pages] int64: page ids; those past a row's length are valid ones
    bound: int  # pages of the longest row, or more

    @property
    def pages(self) -> Tensor:
        """[count, bound] int64, gathered."""
        return self.table[self.slots, : self.bound]


@dataclass(frozen=True, eq=False, slots=True)
class DecodeGroup:
    """Decodes of like length, attended to together."""

    rows: Tensor | slice  # of the decodes
    pages: Tensor  # [rows, pages of the longest] int64
    mask: Tensor  # [rows, 1, 1, positions], to be added to scores


@dataclass(frozen=True, eq=False, slots=True)
class PrefillSpan:
    """A chunk of one prompt: tokens `offset : offset + count` of the batch at positions `start
    ...`.
    """

    offset: int
    count: int
    start: int
    pages: Tensor  # [pages] int64: hold positions 0 .. start + count - 1


@dataclass(frozen=True, eq=False, slots=True)
class ForwardBatch:
    """A mixed batch, flattened: decodes first, then prompt chunks."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    write_at: Tensor  # [tokens] int64: row of the KV pool, page * page_tokens + offset
    decodes: DecodeRows
    spans: tuple[PrefillSpan, ...]
    # attention's own, by part and window: made in the first layer for all that follow
    masks: dict[tuple[PrefillSpan, int | None], Tensor | None] = field(default_factory=dict)
    groups: dict[tuple[DecodeRows, int | None], list[DecodeGroup]] = field(default_factory=dict)
