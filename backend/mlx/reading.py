"""Prompts that we read ourselves, a piece at a time: those that are scored, and those that no token
is drawn for. mlx-lm computes prompts without looking at their logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from backend.interface import TokenLogprob
from backend.mlx.library import Model, PromptCache
from backend.mlx.sampling import Scores

SCORED_TOKENS = 256  # at once: what is computed of them is as large as the vocabulary for each


class Reader:
    """Computes `ids[start:end]` into `cache`, which holds those before. One owner: its sequence."""

    def __init__(
        self, model: Model, cache: PromptCache, ids: Sequence[int], start: int, end: int
    ) -> None:
        self.cache = cache
        self.position = start  # how far the cache has come
        self._model = model
        self._ids = ids
        self._end = end

    @property
    def done(self) -> bool:
        """Whether all is computed."""
        return self.position == self._end

    def read(self, tokens: int, score_from: int | None = None, top: int = 0) -> list[TokenLogprob]:
        """Compute up to `tokens` positions. Returns the log-probabilities of the ids behind those
        from position `score_from` on, where there is one; None: of none.
        """
        start = self.position
        scored = score_from is not None
        end = min(start + (min(tokens, SCORED_TOKENS) if scored else tokens), self._end)
        logits = self._model(mx.array(self._ids[start:end])[None], self.cache)[0]
        self.position = end
        first = end if score_from is None else max(start, score_from)
        targets = self._ids[first + 1 : end + 1]
        scores: list[TokenLogprob] = []
        if targets:
            rows = logits[first - start : first - start + len(targets)]
            scores = Scores.start(rows, mx.array(targets), top).read(targets)
        mx.eval([each.state for each in self.cache])
        return scores
