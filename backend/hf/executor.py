"""The native `StepExecutor`: one forward pass over a mixed batch, then one draw for all rows.

Owns the model, the KV pool, the page tables and the slots' sampling state. One thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.cache import PrefixCache
from backend.hf.attention import PagedAttention
from backend.hf.models import CausalModel
from backend.hf.page_tables import PageTables
from backend.hf.sampling import Sampler, SlotStates, token_logprobs
from backend.interface import BackendSpec, Chunk, StepPlan, StepTokens, TokenLogprob

HEAD_ROWS = 256  # logits of scored prompts are made in slices of this many rows


@dataclass(frozen=True, slots=True)
class Sampling:
    """The chunks of a plan that draw a token, and the row of the batch each draws from."""

    indices: list[int]  # of the chunks in the plan
    chunks: list[Chunk]
    rows: list[int]


class HfExecutor:
    """Runs planned steps with a `CausalModel` over paged KV."""

    def __init__(
        self, spec: BackendSpec, cache: PrefixCache, model: CausalModel, attention: PagedAttention
    ) -> None:
        self.spec = spec
        self.cache = cache
        self._model = model
        self._attention = attention
        self._tables = PageTables(spec)
        self._states = SlotStates(spec.max_running, spec.vocabulary, torch.device(spec.device))
        self._sampler = Sampler(self._states)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepTokens:
        """Run one step. Nothing is left in flight: the handle is the result."""
        for setup in plan.taken:
            self._states.take(setup)
        self._tables.append(plan.chunks)
        batch = self._tables.batch(plan.chunks, self._states.last_token)
        hidden = self._model.hidden(batch, self._attention)
        result = StepTokens([()] * len(plan.chunks), scores=dict(self._score(plan, hidden)))
        sampling = _sampling(plan)
        if sampling.chunks:
            self._sample(sampling, hidden, result)
        return result

    def collect(self, handle: StepTokens) -> StepTokens:
        """The step is over already."""
        return handle

    def close(self) -> None:
        """Nothing to give back: tensors go with their owner."""

    def _sample(self, sampling: Sampling, hidden: Tensor, result: StepTokens) -> None:
        """Draw a token for each sampling chunk into `result`."""
        logits = self._model.logits(hidden[sampling.rows])
        asking = [row for row, chunk in enumerate(sampling.chunks) if chunk.logprobs]
        raw = logits[asking] if asking else None  # before the sampler edits them
        tokens = self._sampler.sample(
            logits,
            [chunk.slot for chunk in sampling.chunks],
            [chunk.start + chunk.count for chunk in sampling.chunks],
        )
        for index, token in zip(sampling.indices, tokens.tolist(), strict=True):
            result.tokens[index] = (token,)
        if raw is not None:
            tops = [sampling.chunks[row].top for row in asking]
            for row, logprob in zip(asking, token_logprobs(raw, tokens[asking], tops), strict=True):
                result.logprobs[sampling.indices[row]] = [logprob]

    def _score(self, plan: StepPlan, hidden: Tensor) -> Iterator[tuple[int, list[TokenLogprob]]]:
        """Log-probabilities of the targets of each chunk that has some, by its index."""
        offset = 0
        for index, chunk in enumerate(plan.chunks):
            if chunk.targets:
                first = offset + chunk.score_start - chunk.start
                rows = hidden[first : first + len(chunk.targets)]
                yield index, self._score_rows(rows, chunk)
            offset += chunk.count

    def _score_rows(self, rows: Tensor, chunk: Chunk) -> list[TokenLogprob]:
        targets = torch.tensor(chunk.targets, dtype=torch.int64, device=rows.device)
        scores: list[TokenLogprob] = []
        for start in range(0, len(rows), HEAD_ROWS):
            logits = self._model.logits(rows[start : start + HEAD_ROWS])
            wanted = targets[start : start + HEAD_ROWS]
            scores += token_logprobs(logits, wanted, [chunk.top] * len(wanted))
        return scores


def _sampling(plan: StepPlan) -> Sampling:
    found = Sampling([], [], [])
    offset = 0
    for index, chunk in enumerate(plan.chunks):
        offset += chunk.count
        if chunk.samples:
            found.indices.append(index)
            found.chunks.append(chunk)
            found.rows.append(offset - 1)
    return found
