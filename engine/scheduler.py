"""Continuous batching: turns an executor that runs single steps into a backend that answers
submissions.

Owned by the engine, one thread. Each step holds decodes first, oldest first, then chunks of prompts
within a token budget (chunked prefill: Agrawal et al. 2023). Admission keeps head-room for the
sequences that run instead of reserving whole answers; when a decode cannot grow, the youngest
sequence yields: its pages stay in the tree and it returns to the front of the queue.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Sequence as Values
from dataclasses import dataclass, field

from backend.interface import (
    EXPIRED,
    BackendSpec,
    Chunk,
    Delta,
    Finish,
    Load,
    SamplingParams,
    SlotSetup,
    StepExecutor,
    StepHandle,
    StepOutput,
    StepPlan,
    Submission,
    TokenLogprob,
)
from engine.constraints import Constraints
from engine.sequence import Sequence

HEADROOM_TOKENS = 64  # kept free at admission for the growth of each running sequence


@dataclass(slots=True)
class Draft:
    """A step while it is planned: its chunks, whose they are, and the tokens that still fit."""

    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    taken: list[SlotSetup] = field(default_factory=list)

    def add(self, sequence: Sequence, chunk: Chunk) -> None:
        """Let the step have the next `chunk` of `sequence`."""
        self.budget -= chunk.count
        self.chunks.append(chunk)
        self.sequences.append(sequence)
        if chunk.first:
            self.taken.append(sequence.setup())


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step: its plan, whose chunks they are, and when it left."""

    plan: StepPlan
    sequences: list[Sequence]  # parallel to plan.chunks
    handle: StepHandle
    launched: float  # time.monotonic()


class Scheduler:
    """A `Backend` over a `StepExecutor`.

    submit -> waiting -> running -> leaving (until no step is in flight) -> gone, or waiting again
    """

    def __init__(self, executor: StepExecutor) -> None:
        self.executor = executor
        self.cache = executor.cache
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by number, so the youngest is last
        self._leaving: list[Sequence] = []
        self._flights: deque[Flight] = deque()
        self._slots = list(range(executor.spec.max_running - 1, -1, -1))
        self._live: dict[str, Sequence] = {}  # until their finish has gone out
        self._news: list[Delta] = []  # what happened between two steps
        self._constraints = Constraints(executor.spec)
        self._count = self._preemptions = self._steps = 0

    @property
    def spec(self) -> BackendSpec:
        return self.executor.spec

    # Requests

    def submit(self, submission: Submission) -> None:
        """Queue a submission. It ends at once when nothing is left to generate."""
        sampling = submission.sampling
        own = () if sampling.ignore_eos else self.spec.stop_ids
        sequence = Sequence(
            submission,
            number=self._count,
            stop_ids=frozenset((*own, *sampling.stop_token_ids)),
            ids=[*submission.prompt, *submission.received],
            limit=len(submission.prompt) + submission.max_new_tokens,
            scored=bool(submission.received),  # they came with the first token
        )
        if sampling.grammar is not None:
            sequence = self._constraints.bind(sampling.grammar, sequence)
        self._count += 1
        self._live[submission.id] = sequence
        if submission.received and sequence.growth <= 0:
            self._finish(sequence, Finish("length"))
        else:
            self._waiting.append(sequence)

    def cancel(self, id: str) -> None:
        """End a sequence with finish "abort"; an unknown id is ignored."""
        sequence = self._live.get(id)
        if sequence is None:
            return
        if sequence in self._running:
            self._leave(sequence, returns=False)
        elif sequence.leaving:
            sequence.returns = False  # it was yielding, and now stays away
        else:
            self._waiting.remove(sequence)
        self._finish(sequence, Finish("abort"))

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        """Say that a sequence ended without a new token."""
        del self._live[sequence.submission.id]
        self._news.append(
            Delta(
                sequence.submission.id,
                finish=finish,
                cached=sequence.report(),
                work=sequence.work(),
            )
        )

    # Steps

    def advance(self, wait: float) -> StepOutput:
        """Plan and launch the next step, then settle the oldest one while the device works.

        Blocks for `wait` only where all that is left waits for a grammar to be compiled. What
        happened between two steps comes with the next call, also when that has no step to do.
        """
        output = self._step()
        output.deltas[:0], self._news = self._news, []
        if self._constraints and not (self._running or self._leaving or output.deltas):
            self._constraints.wait(wait)
        output.entered, output.evicted = self.cache.events()
        return output

    def _step(self) -> StepOutput:
        """What the device did; not what happened between two steps."""
        draft = self._plan()
        output = self._launch(draft) if draft.chunks else StepOutput()
        if self._flights and (not draft.chunks or len(self._flights) == self.spec.depth):
            self._settle(self._flights.popleft(), output)
        return output

    def _launch(self, draft: Draft) -> StepOutput:
        """Start a step. Where a grammar binds one of its rows, settle those ahead of it, while the
        device works: what they brought decides what this one may draw.
        """
        bound = self._constraints.drawing(draft.chunks) if self._constraints else {}
        plan = StepPlan(draft.chunks, draft.taken, tuple(bound))
        launched = time.monotonic()
        handle = self.executor.launch(plan)
        output = StepOutput()
        if bound:
            while self._flights:
                self._settle(self._flights.popleft(), output)
            self.executor.sample(handle, self._constraints.masks(bound))
        self._flights.append(Flight(plan, draft.sequences, handle, launched))
        return output

    def _plan(self) -> Draft:
        draft = Draft(self.spec.max_step_tokens)
        self._expire(time.monotonic())
        if self._constraints:
            self._open_grammars()
        self._plan_decodes(draft)
        self._plan_prompts(draft)
        self._admit_waiting(draft)
        return draft

    def _expire(self, now: float) -> None:
        """End the waiting sequences whose deadline passed before they ever ran."""
        for sequence in [each for each in self._waiting if each.is_late(now)]:
            self._waiting.remove(sequence)
            self._finish(sequence, EXPIRED)

    def _open_grammars(self) -> None:
        """Let sequences start whose grammar has been compiled, and end those that have none."""
        for sequence, finish in self._constraints.open_compiled(self._live):
            self._waiting.remove(sequence)
            self._finish(sequence, finish)

    def _plan_decodes(self, draft: Draft) -> None:
        index = 0  # not an iterator: the youngest, at the end of the list, may leave meanwhile
        while index < len(self._running) and draft.budget:
            sequence = self._running[index]
            index += 1
            if sequence.decodes and self._grow(sequence):
                draft.add(sequence, sequence.next_decode())

    def _plan_prompts(self, draft: Draft) -> None:
        for sequence in self._running:
            if draft.budget and sequence.prefilling:
                draft.add(sequence, sequence.next_chunk(draft.budget))

    def _admit_waiting(self, draft: Draft) -> None:
        """Start waiting sequences in order, while there are rows, pages and budget for them.

        Passed over are a sequence whose group has a prompt under way, as it will lease those pages,
        and one whose grammar is still compiled.
        """
        if not self._waiting:
            return
        under_way = {each.submission.group for each in self._running if not each.prompt_settled}
        for sequence in list(self._waiting):
            if not (draft.budget and self._slots):
                return
            group = sequence.submission.group
            if group is not None and group in under_way:
                continue
            if sequence.waits:
                continue
            if not self._admit(sequence):
                return
            self._waiting.remove(sequence)
            under_way.add(group)
            draft.add(sequence, sequence.next_chunk(draft.budget))

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and pages for all that it knows.

        False when the pages are not to be had.
        """
        headroom = sum(
            self.spec.pages_for(min(HEADROOM_TOKENS, each.growth)) for each in self._running
        )
        lease = self.cache.lease(
            sequence.submission.namespace, sequence.ids, sequence.match_limit, spare=headroom
        )
        if lease is None:
            return False
        sequence.place(self._slots.pop(), lease)
        insort(self._running, sequence, key=lambda each: each.number)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more position.

        When there is none, the youngest yields, which may be `sequence` itself.

        False: not in this step.
        """
        here = sequence.here
        while not self.cache.grow(here.lease, here.planned + 1):
            if self._leaving:
                return False  # their pages come home when their steps settle
            youngest = self._running[-1]
            self._preemptions += 1
            self._leave(youngest, returns=True)
            if youngest is sequence:
                return False
        return True

    # Endings

    def _leave(self, sequence: Sequence, returns: bool) -> None:
        """Take a running sequence out of the batch, for good or to come back later."""
        self._running.remove(sequence)
        sequence.leaving, sequence.returns = True, returns
        self._leaving.append(sequence)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Take slot and pages back from a leaving sequence, once no step in flight uses them."""
        if sequence.here.inflight:
            return
        self._leaving.remove(sequence)
        self._slots.append(sequence.here.slot)
        self.cache.close(sequence.displace())
        if sequence.returns:
            self._waiting.appendleft(sequence)

    def _settle(self, flight: Flight, output: StepOutput) -> None:
        """Wait for a step and put what it brought into `output`."""
        self._enter_prompts(flight)
        results = self.executor.collect(flight.handle)
        self._steps += 1
        output.step_tokens += flight.plan.tokens
        output.step_seconds += time.monotonic() - flight.launched
        rows = len(flight.sequences)
        for index, hidden in results.pooled.items():
            flight.sequences[index].add_pooled(hidden)
        for index, (sequence, chunk) in enumerate(
            zip(flight.sequences, flight.plan.chunks, strict=True)
        ):
            here = sequence.here
            here.inflight -= 1
            here.sampling -= chunk.samples
            if sequence.leaving:
                self._retire(sequence)
                continue
            here.settled = chunk.start + chunk.count
            sequence.steps += 1
            sequence.rows += rows
            sequence.scores += results.scores.get(index, ())
            delta = self._take(sequence, results.tokens[index], results.logprobs.get(index, ()))
            if delta is not None:
                output.deltas.append(delta)

    def _enter_prompts(self, flight: Flight) -> None:
        """Enter the prompt pages of a step into the tree. Nothing is planned before it has settled,
        and this work is not waited for: the device has its own.
        """
        for sequence, chunk in zip(flight.sequences, flight.plan.chunks, strict=True):
            if chunk.tokens is not None and not sequence.leaving:
                lease = sequence.here.lease
                self.cache.commit(lease, sequence.ids, chunk.start + chunk.count)

    def _take(
        self, sequence: Sequence, tokens: Values[int], logprobs: Values[TokenLogprob]
    ) -> Delta | None:
        """Add settled tokens to a sequence. None while its prompt goes on."""
        count, finish = sequence.append(tokens)
        self.cache.commit(sequence.here.lease, sequence.ids, sequence.here.settled)
        if not (count or finish):
            return sequence.progress()
        delta = Delta(sequence.submission.id, tokens[:count], finish, logprobs=logprobs[:count])
        if not sequence.reported:
            delta.cached, delta.prompt_logprobs = sequence.report(), sequence.report_scores()
        if finish:
            delta.pooled, delta.work = sequence.report_pooled(), sequence.work()
            del self._live[sequence.submission.id]
            self._leave(sequence, returns=False)
        return delta

    # The rest of the protocol

    def fileno(self) -> int | None:
        """None: `advance` is where the work is done."""
        return None

    def load(self) -> Load:
        """How busy the batch and the pages are."""
        return Load(
            running=len(self._running) + len(self._leaving),
            waiting=len(self._waiting),
            pages_total=self.cache.pool.size,
            pages_free=self.cache.pool.free,
            pages_cached=self.cache.tree.pages - self.cache.tree.pinned,
            pages_leased=self.cache.leased,
            preemptions=self._preemptions,
            steps=self._steps,
        )

    def warm(self, tokens: int) -> int:
        """Generate `tokens` tokens for nobody, at most what the context and the pages hold.

        Returns the steps run.
        """
        room = min(self.spec.max_model_len, self.cache.pool.size * self.cache.page_tokens) - 1
        sampling = SamplingParams(max_new_tokens=min(tokens, room), ignore_eos=True)
        before = self._steps
        self.submit(Submission("warm", (0,), sampling, seed=0, namespace="warm"))
        while "warm" in self._live:
            self._step()  # the news of others stay for `advance`
        return self._steps - before

    def prepare(self) -> bool:
        """Let the executor use the time."""
        return self.executor.prepare()

    def flush(self) -> int:
        """Give up every cached prefix that is not in use."""
        return self.cache.flush()

    def close(self) -> None:
        """Give back the device."""
        self._constraints.close()
        self.executor.close()
