"""A submission at work: its ids, its place on the device, and how far each has come.

Owned by the scheduler alone. What was planned and what came back are two numbers, so that the next
step can be planned while the last one's tokens are still on the device.
"""

from __future__ import annotations

from collections.abc import Sequence as Values
from dataclasses import dataclass, field

from backend.cache import Lease
from backend.interface import (
    Chunk,
    Delta,
    Finish,
    Pooling,
    SlotSetup,
    Submission,
    TokenLogprob,
    Work,
)


@dataclass(eq=False, slots=True)
class Placement:
    """What a running sequence holds: a row of the batch and its pages.

    Made at admission, gone at retirement.
    """

    slot: int
    lease: Lease
    prefill_end: int  # positions known at admission; after them each input is the token before it
    planned: int  # positions given to the device
    settled: int  # positions whose step has come back
    sent_pages: int = 0  # pages of the lease that the device knows of
    inflight: int = 0  # steps not settled; while there is one, nothing is given back
    sampling: int = 0  # of these, those that bring a token


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer, from its submission to its finish."""

    submission: Submission
    number: int  # order of arrival: the highest is the youngest
    stop_ids: frozenset[int]
    ids: list[int]  # prompt and settled output
    limit: int  # `ids` never get longer
    placement: Placement | None = None
    cached: int | None = None  # prompt tokens that the cache answered at first; None: never ran
    reported: bool = False  # `cached` has gone out
    scored: bool = False  # all prompt log-probabilities are there
    scores: list[TokenLogprob] = field(default_factory=list)
    leaving: bool = False  # ended or yielding: results of steps in flight are dropped
    returns: bool = False  # with leaving: goes back to the queue instead of ending
    pooled: list[float] = field(default_factory=list)  # sum of the hidden states asked for
    steps: int = 0  # settled, of those that it took part in
    rows: int = 0  # of all these together
    yields: int = 0
    computed: int = 0  # prompt positions of earlier placements: see `Work`
    waits: bool = False  # for something of its own, before it may be admitted

    @property
    def here(self) -> Placement:
        """The placement of a running sequence."""
        assert self.placement is not None, f"sequence {self.submission.id} is not running"
        return self.placement

    @property
    def score_from(self) -> int | None:
        """First prompt position whose successor is still to be scored."""
        return None if self.scored else self.submission.wants.prompt_logprobs_from

    @property
    def match_limit(self) -> int:
        """Positions that a cache match may answer: the last known token is computed again, and so
        are scored positions, and those whose hidden states are wanted.
        """
        if self.submission.wants.pooling == "mean":
            return 0
        limit = len(self.ids) - 1
        return limit if self.score_from is None else min(limit, self.score_from)

    @property
    def prompt_settled(self) -> bool:
        """Whether all that was known at admission is computed, and in the tree."""
        return self.here.settled >= self.here.prefill_end

    @property
    def prefilling(self) -> bool:
        return self.here.planned < self.here.prefill_end

    @property
    def decodes(self) -> bool:
        """Whether a next token can be planned: the prompt is under way, and not all tokens are
        promised yet.
        """
        here = self.here
        return here.planned >= here.prefill_end and len(self.ids) + here.sampling < self.limit

    @property
    def growth(self) -> int:
        """Tokens that may still come."""
        return self.limit - len(self.ids)

    def is_late(self, now: float) -> bool:
        """Whether its deadline has passed before it ever ran. `now` is time.monotonic()."""
        deadline = self.submission.deadline
        return deadline is not None and deadline <= now and self.cached is None

    def place(self, slot: int, lease: Lease) -> None:
        """Start to run, in `slot`, on the pages of `lease`."""
        self.placement = Placement(slot, lease, len(self.ids), lease.shared, lease.shared)
        if self.cached is None:
            self.cached = min(lease.shared, len(self.submission.prompt))

    def displace(self) -> Lease:
        """Stop running.

        Returns the lease, for its owner to close; scores and sums of an unfinished prompt are done
        again.
        """
        lease = self.here.lease
        self.computed += self._computed_here
        self.yields += self.returns
        self.placement = None
        self.leaving = False
        self.pooled = []
        if not self.scored:
            self.scores = []
        return lease

    @property
    def _computed_here(self) -> int:
        """Of the positions known at admission, those computed since."""
        here = self.placement
        return 0 if here is None else min(here.settled, here.prefill_end) - here.lease.shared

    def work(self) -> Work:
        """What it has taken so far."""
        return Work(self.steps, self.rows, self.yields, self.computed + self._computed_here)

    def progress(self) -> Delta | None:
        """News of a prompt that goes on, for whoever asked for them."""
        if not self.submission.wants.progress or self.here.settled >= self.here.prefill_end:
            return None
        return Delta(self.submission.id, prefilled=self.here.settled)

    def add_pooled(self, hidden: Values[float]) -> None:
        """Add the hidden states that a settled chunk brought."""
        before = self.pooled or [0.0] * len(hidden)
        self.pooled = [a + b for a, b in zip(before, hidden, strict=True)]

    def append(self, tokens: Values[int]) -> tuple[int, Finish | None]:
        """Take settled tokens up to the one that ends the answer.

        Returns how many were taken, and that end.
        """
        ids = self.ids
        for count, token in enumerate(tokens, start=1):
            ids.append(token)
            if token in self.stop_ids:
                return count, Finish("stop", matched=token)
            if len(ids) == self.limit:
                return count, Finish("length")
        done = len(ids) == self.limit and self.prompt_settled  # asked for no token at all
        return len(tokens), Finish("length") if done else None

    def report(self) -> int | None:
        """The cached count, the first time it is asked for."""
        if self.reported:
            return None
        self.reported = True
        return self.cached or 0

    def report_scores(self) -> list[TokenLogprob]:
        """The prompt log-probabilities, once they are complete."""
        scores, self.scores = self.scores, []
        self.scored = True
        return scores

    def report_pooled(self) -> Values[float]:
        """The vector of the whole prompt, if one was asked for."""
        if self.submission.wants.pooling == "mean":
            return [value / len(self.submission.prompt) for value in self.pooled]
        return self.pooled

    def setup(self) -> SlotSetup:
        """What the device must know to sample for this sequence in its slot."""
        sampling = self.submission.sampling
        prompt_tokens = len(self.submission.prompt)
        return SlotSetup(
            slot=self.here.slot,
            sampling=sampling,
            seed=self.submission.seed,
            stop_ids=tuple(sorted(self.stop_ids)),
            min_position=prompt_tokens + sampling.min_new_tokens,
            prompt=self.submission.prompt if sampling.penalised else (),
            output=tuple(self.ids[prompt_tokens:]) if sampling.penalised else (),
        )

    def next_decode(self) -> Chunk:
        """The next position, whose token the device has. The lease holds its page already."""
        here, wants = self.here, self.submission.wants
        # by place, not by name: this is done for each row of each step
        chunk = Chunk(
            here.slot, here.planned, 1, None, self._unsent_pages(), False, True, wants.logprobs,
            wants.top,
        )  # fmt: skip
        self._mark_planned(chunk)
        return chunk

    def next_chunk(self, budget: int) -> Chunk:
        """The next positions of the prompt, `budget` at most. The lease holds their pages
        already.
        """
        here = self.here
        start = here.planned
        end = min(start + budget, here.prefill_end)
        samples = end == here.prefill_end and self.submission.max_new_tokens > 0
        score_start, targets = self._targets(start, end)
        chunk = Chunk(
            slot=here.slot,
            start=start,
            count=end - start,
            tokens=self.ids[start:end],
            first=here.sent_pages == 0,
            pages=self._unsent_pages(),
            samples=samples,
            logprobs=samples and self.submission.wants.logprobs,
            top=self.submission.wants.top,
            score_start=score_start,
            targets=targets,
            pools=self._pools(end),
        )
        self._mark_planned(chunk)
        return chunk

    def _pools(self, end: int) -> Pooling | None:
        """What is summed of a chunk up to `end`."""
        pooling = self.submission.wants.pooling
        return pooling if pooling != "last" or end == self.here.prefill_end else None

    def _unsent_pages(self) -> Values[int]:
        """Pages of the lease that the device does not know of yet; it does from now on."""
        here = self.here
        pages, sent = here.lease.pages, here.sent_pages
        if len(pages) == sent:
            return ()
        here.sent_pages = len(pages)
        return pages[sent:]

    def _mark_planned(self, chunk: Chunk) -> None:
        here = self.here
        here.planned += chunk.count
        here.inflight += 1
        here.sampling += chunk.samples

    def _targets(self, start: int, end: int) -> tuple[int, tuple[int, ...]]:
        """Where scoring begins in positions `start:end`, and the prompt ids that follow each scored
        position.
        """
        if self.score_from is None:
            return 0, ()
        first = max(start, self.score_from)
        return first, self.submission.prompt[first + 1 : end + 1] if first < end else ()
