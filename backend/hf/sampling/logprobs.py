"""Log-probabilities of chosen tokens and of the most probable ones: natural, of raw logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backend.interface import TokenLogprob


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of some rows, still on the device."""

    tokens: Tensor  # [rows] int64
    chosen: Tensor  # [rows] float32
    top_ids: Tensor  # [rows, top] int64, most probable first
    top: Tensor  # [rows, top] float32

    def read(self, tops: Sequence[int]) -> list[TokenLogprob]:
        """Values for the host, row i with its `tops[i]` best. Waits for the device."""
        columns = (self.tokens, self.chosen, self.top_ids, self.top)
        rows = zip(*(column.tolist() for column in columns), tops, strict=True)
        return [
            TokenLogprob(token, chosen, tuple(zip(ids[:top], best[:top], strict=True)))
            for token, chosen, ids, best, top in rows
        ]


def score(logits: Tensor, tokens: Tensor, top: int) -> Scores:
    """Scores of `tokens` [rows] under raw `logits` [rows, vocabulary] float32, with the `top`
    most probable.

    `Sampler.sample` edits logits in place: keep a copy of the rows that are scored after it.
    """
    norm = logits.logsumexp(-1, keepdim=True)
    best, ids = logits.topk(min(top, logits.shape[-1]))
    chosen = logits.gather(1, tokens[:, None]) - norm
    return Scores(tokens, chosen[:, 0], ids, best - norm)


def token_logprobs(logits: Tensor, tokens: Tensor, tops: Sequence[int]) -> list[TokenLogprob]:
    """`score`, read at once: the row i of `logits` with its `tops[i]` best."""
    return score(logits, tokens, max(tops, default=0)).read(tops)
