"""Runs a workload through an engine in this process and notes when each token came."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from backend.interface import Delta, SamplingParams, StepOutput, Submission
from bench.roofline import StepWork
from bench.summary import Record
from bench.workloads import Workload


class Steppable(Protocol):
    """The part of `engine.engine.Engine` that is driven here."""

    def submit(self, submission: Submission) -> None:
        """Take over a submission."""

    def step(self, wait: float = 0.0) -> StepOutput:
        """Do the next piece of work."""


@dataclass(slots=True)
class Measured:
    """One run of a workload."""

    records: list[Record] = field(default_factory=list)  # in order of submission
    steps: list[StepWork] = field(default_factory=list)
    duration_s: float = 0.0


@dataclass(slots=True)
class Running:
    """A request in flight."""

    record: Record
    length: int  # tokens of its prompt and of its answer so far


@dataclass(slots=True)
class Driver:
    """A closed loop: `concurrency` requests at most are in flight, the next one starts when one
    ends.

    Submission ids begin with `label`, so that two runs on one engine never share one.
    """

    engine: Steppable
    workload: Workload
    concurrency: int
    label: str
    progress: Callable[[int], object] = lambda tokens: None  # told how many tokens came
    _running: dict[str, Running] = field(default_factory=dict, init=False)

    def run(self) -> Measured:
        """Submit everything, step until everything has ended. Raises what the engine raises."""
        measured = Measured()
        waiting = deque(self._submissions())
        start = settled = time.perf_counter()
        while waiting or self._running:
            while waiting and len(self._running) < self.concurrency:
                measured.records.append(self._submit(waiting.popleft()))
            output = self.engine.step(wait=0.1)
            now = time.perf_counter()
            contexts = [context for delta in output.deltas if (context := self._note(delta, now))]
            self.progress(sum(len(delta.tokens) for delta in output.deltas))
            if output.step_tokens:
                measured.steps.append(_work(output, contexts, now - settled))
                settled = now
        measured.duration_s = time.perf_counter() - start
        return measured

    def _submissions(self) -> Iterator[Submission]:
        for number, job in enumerate(self.workload.jobs):
            sampling = SamplingParams(
                temperature=self.workload.temperature,
                max_new_tokens=job.new_tokens,
                ignore_eos=True,
                grammar=self.workload.grammar,
            )
            yield Submission(f"{self.label}-{number}", job.prompt, sampling, seed=number)

    def _submit(self, submission: Submission) -> Record:
        now = time.monotonic()
        self.engine.submit(replace(submission, arrival=now))
        record = Record(len(submission.prompt), submitted=time.perf_counter())
        self._running[submission.id] = Running(record, len(submission.prompt))
        return record

    def _note(self, delta: Delta, now: float) -> int:
        """Book a delta. Returns the positions that its tokens' row attended to; 0 without tokens.

        The token that came is the last of its row and was not attended to yet.
        """
        running = self._running[delta.id]
        running.length += len(delta.tokens)
        record = running.record
        record.cached_tokens += delta.cached or 0
        if delta.finish is not None:
            del self._running[delta.id]
            record.ended = now
            if delta.finish.reason in ("abort", "error"):
                record.failure = delta.finish.message or delta.finish.reason
        if not delta.tokens:
            return 0
        record.arrivals.append((now, len(delta.tokens)))
        return running.length - 1


def _work(output: StepOutput, contexts: list[int], interval: float) -> StepWork:
    """What a step did, by what each row attended to that it brought a token."""
    seconds = output.step_seconds
    return StepWork(output.step_tokens, len(contexts), sum(contexts), seconds, interval)
