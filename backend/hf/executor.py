"""The native `StepExecutor`: one forward pass over a mixed batch, then one draw for all rows.

Owns the model, the KV pool, the page tables and the slots' sampling state. One thread. Nothing here
waits for the device but `collect`, and that only for its own step: a step reads the tokens of the
one before it where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backend.cache import PrefixCache
from backend.hf.attention import PagedAttention
from backend.hf.batch import ForwardBatch
from backend.hf.cuda_graphs import Recorder
from backend.hf.decode_graphs import DecodeGraphs
from backend.hf.models import CausalModel
from backend.hf.models.decoder import Decoder
from backend.hf.page_tables import PageTables
from backend.hf.pooling import pool
from backend.hf.prompt_graphs import PromptGraphs
from backend.hf.sampling import NO_MASKS, PendingScores, Scorer, open_sampler
from backend.hf.transfer import to_device, to_host
from backend.interface import (
    BackendSpec,
    Chunk,
    DeviceLost,
    StepPlan,
    StepTokens,
    TokenMask,
    first_line,
)

HEAD_ROWS = 256  # logits of scored prompts are made in slices of this many rows


@dataclass(frozen=True, eq=False, slots=True)
class Undrawn:
    """Rows that are to draw a token, and their logits on the device; good until the next step.

    `logits` [rows, vocabulary] float32, raw. `tokens` [rows] int64: what a graph has drawn from
    them, as if nothing edited them; None: nothing is drawn yet.
    """

    chunks: Sequence[Chunk]
    slots: list[int]
    positions: list[int]  # of the tokens
    logits: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Pending:
    """Scores on their way: of which chunks, with how many alternatives each."""

    scores: PendingScores
    tops: list[int]
    owners: list[int]  # index of a chunk in the plan, for each row


@dataclass(eq=False, slots=True)
class InFlight:
    """A launched step: what is on its way to the host."""

    chunks: int
    sampling: list[int]  # indices of the chunks that draw a token
    tokens: Tensor | None = None  # [sampling] int64 on the host
    logprobs: Pending | None = None  # of the tokens drawn
    scores: list[Pending] = field(default_factory=list)  # of prompts
    pooled: dict[int, Tensor] = field(default_factory=dict)  # [hidden], by index of the chunk
    undrawn: Undrawn | None = None  # until `sample`
    done: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until all of it is there."""
        if self.done is not None:
            self.done.synchronize()

    def read(self) -> StepTokens:
        """The results, as the scheduler wants them. After `wait`."""
        result = StepTokens([()] * self.chunks)
        tokens = [] if self.tokens is None else self.tokens.tolist()
        for index, token in zip(self.sampling, tokens, strict=True):
            result.tokens[index] = (token,)
        for into, pending in [
            *((result.scores, each) for each in self.scores),
            *([(result.logprobs, self.logprobs)] if self.logprobs else []),
        ]:
            for index, found in zip(pending.owners, pending.scores.read(pending.tops), strict=True):
                into.setdefault(index, []).append(found)
        result.pooled = {index: hidden.tolist() for index, hidden in self.pooled.items()}
        return result


@dataclass(frozen=True, eq=False, slots=True)
class StepGraphs:
    """The CUDA graphs of an executor."""

    decodes: DecodeGraphs
    prompts: PromptGraphs

    def prepare(self) -> bool:
        """Capture one more size. False: all of them are there."""
        return self.decodes.prepare() or self.prompts.prepare()


@contextmanager
def device_errors() -> Iterator[None]:
    """What a CUDA device failed with, maybe steps ago, as DeviceLost in one line."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise DeviceLost(first_line(error)) from error


class HfExecutor:
    """Runs planned steps with a `CausalModel` over paged KV."""

    def __init__(
        self,
        spec: BackendSpec,
        cache: PrefixCache,
        model: CausalModel,
        attention: PagedAttention,
        kernels: bool = False,
        graphs: Decoder | None = None,
    ) -> None:
        """`kernels`: ours run on this device. `graphs`: the model again, when steps run by CUDA
        graphs, which kernels and attention must allow.
        """
        self.spec = spec
        self.cache = cache
        self._model = model
        self._attention = attention
        self._tables = PageTables(spec, kernels)
        self._states, self._sampler = open_sampler(
            spec.max_running, spec.vocabulary, spec.device, kernels
        )
        self._scorer = Scorer(kernels)
        self._graphs = None if graphs is None else self._open_graphs(graphs)

    def _open_graphs(self, model: Decoder) -> StepGraphs:
        spec, recorder = self.spec, Recorder(self.spec.device)
        return StepGraphs(
            DecodeGraphs(
                self._decode_any_length,
                self._sampler.draw_bound,
                recorder,
                spec.max_running,
                spec.vocabulary,
                self._tables.spare_slot,
                spec.device,
            ),
            PromptGraphs(
                model,
                self._attention,
                recorder,
                spec.max_step_tokens,
                spec.pages * spec.page_tokens,
                spec.device,
            ),
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> InFlight:
        """Start one step. On a CPU it runs here; the handle is the result."""
        with device_errors():
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> InFlight:
        self._states.take(plan.taken)
        self._tables.append(plan.chunks)
        sampling = [index for index, chunk in enumerate(plan.chunks) if chunk.samples]
        flight = InFlight(len(plan.chunks), sampling)
        sampled = [plan.chunks[index] for index in sampling]
        decodes_only = plan.chunks[-1].tokens is None
        undrawn = self._decode(sampled) if decodes_only else self._forward(plan, sampled, flight)
        if plan.masked:
            flight.undrawn = undrawn
        else:
            self._end(flight, undrawn, NO_MASKS)
        return flight

    @torch.inference_mode()
    def sample(self, handle: InFlight, masks: Mapping[int, TokenMask]) -> None:
        """Draw the tokens of a step that was launched with masked chunks."""
        undrawn, handle.undrawn = handle.undrawn, None
        rows = {row: masks[index] for row, index in enumerate(handle.sampling) if index in masks}
        with device_errors():
            self._end(handle, undrawn, rows)

    def _end(
        self, flight: InFlight, undrawn: Undrawn | None, masks: Mapping[int, TokenMask]
    ) -> None:
        """Draw, by the `masks` of rows, and send everything to the host."""
        if undrawn is not None:
            self._finish(undrawn, self._draw(undrawn, masks), flight)
        if self.spec.device == "cuda":
            flight.done = torch.cuda.Event()
            flight.done.record()

    def _draw(self, undrawn: Undrawn, masks: Mapping[int, TokenMask]) -> Tensor:
        """Tokens [rows] int64; they are in their slots, too."""
        logits, tokens = undrawn.logits, undrawn.tokens
        slots, positions = undrawn.slots, undrawn.positions
        if tokens is None:
            return self._sampler.sample(logits, slots, positions, masks)
        assert self._graphs is not None
        if masks:
            redrawn = self._graphs.decodes.redraw(len(slots), masks)
            if redrawn is not None:
                tokens, masks = redrawn, self._sampler.edited(slots, masks)
        self._sampler.redraw(logits, tokens, slots, positions, masks)
        return tokens

    def collect(self, handle: InFlight) -> StepTokens:
        """Wait for the step. Raises DeviceLost."""
        with device_errors():
            handle.wait()
        return handle.read()

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Capture one more graph. False: nothing is left to prepare."""
        return self._graphs is not None and self._graphs.prepare()

    def close(self) -> None:
        """Nothing to give back: tensors go with their owner."""

    def _decode(self, chunks: Sequence[Chunk]) -> Undrawn:
        """A step of decodes alone."""
        slots = [chunk.slot for chunk in chunks]
        starts = [chunk.start for chunk in chunks]
        positions = [start + 1 for start in starts]
        found = None if self._graphs is None else self._graphs.decodes.run(slots, starts)
        if found is not None:
            tokens, logits = found
            return Undrawn(chunks, slots, positions, logits, tokens)
        sent = to_device([slots, starts], self.spec.device)
        batch = self._tables.decodes(sent[0], sent[1], max(positions), self._states.last_token)
        logits = self._model.logits(self._model.hidden(batch, self._attention))
        return Undrawn(chunks, slots, positions, logits)

    def _decode_any_length(self, slots: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        """A step of decodes for a graph: see `decode_graphs.Decode`."""
        longest = self.spec.max_model_len
        batch = self._tables.decodes(slots, positions, longest, self._states.last_token)
        self._model.logits(self._model.hidden(batch, self._attention), out=logits)
        return self._sampler.draw(logits, slots, positions + 1, ())

    def _forward(
        self, plan: StepPlan, sampled: Sequence[Chunk], flight: InFlight
    ) -> Undrawn | None:
        """A mixed step; scores of prompts go into `flight`. None: no chunk draws."""
        batch = self._tables.batch(plan.chunks, self._states.last_token)
        hidden = self._hidden(batch)
        flight.scores += self._score(plan, hidden)
        flight.pooled = pool(plan.chunks, hidden)
        if not sampled:
            return None
        ends, offset = [], 0
        for chunk in plan.chunks:
            offset += chunk.count
            if chunk.samples:
                ends.append(offset - 1)
        slots = [chunk.slot for chunk in sampled]
        positions = [chunk.start + chunk.count for chunk in sampled]
        logits = self._model.logits(hidden.index_select(0, to_device(ends, self.spec.device)))
        return Undrawn(sampled, slots, positions, logits)

    def _hidden(self, batch: ForwardBatch) -> Tensor:
        """Final hidden states of a mixed step, [tokens, hidden]."""
        found = None if self._graphs is None else self._graphs.prompts.hidden(batch)
        return self._model.hidden(batch, self._attention) if found is None else found

    def _finish(self, undrawn: Undrawn, tokens: Tensor, flight: InFlight) -> None:
        """Score what is asked for, and send all to the host."""
        chunks = undrawn.chunks
        asking = [row for row, chunk in enumerate(chunks) if chunk.logprobs]
        if asking:
            rows = to_device(asking, self.spec.device)
            tops = [chunks[row].top for row in asking]
            scores = self._scorer.start(
                undrawn.logits.index_select(0, rows), tokens.index_select(0, rows), max(tops)
            )
            owners = [flight.sampling[row] for row in asking]
            flight.logprobs = Pending(scores, tops, owners)
        flight.tokens = to_host(tokens)

    def _score(self, plan: StepPlan, hidden: Tensor) -> Iterator[Pending]:
        """Log-probabilities of the targets of each chunk that has some."""
        offset = 0
        for index, chunk in enumerate(plan.chunks):
            if chunk.targets:
                first = offset + chunk.score_start - chunk.start
                rows = hidden[first : first + len(chunk.targets)]
                yield from self._score_rows(rows, chunk, index)
            offset += chunk.count

    def _score_rows(self, rows: Tensor, chunk: Chunk, owner: int) -> Iterator[Pending]:
        targets = to_device(chunk.targets, self.spec.device)
        for start in range(0, len(rows), HEAD_ROWS):
            logits = self._model.logits(rows[start : start + HEAD_ROWS])
            wanted = targets[start : start + HEAD_ROWS]
            scores = self._scorer.start(logits, wanted, chunk.top)
            yield Pending(scores, [chunk.top] * len(wanted), [owner] * len(wanted))
