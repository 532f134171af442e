"""A submission at work: its ids, what it holds of the batch, and when it ends.

Owned by the backend alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backend.interface import BackendSpec, Delta, Finish, Submission, TokenLogprob, Work
from backend.mlx.grammars import Follower
from backend.mlx.reading import Reader
from backend.mlx.sampling import RowDraws


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer, from its submission to its finish.

    waiting -> running: reading (some prompts), then a row of the batch -> leaving -> gone
    """

    submission: Submission
    stop_ids: frozenset[int]
    ids: list[int]  # prompt and output
    follower: Follower | None = None  # of a grammar
    reader: Reader | None = None  # while we read the prompt, and not mlx-lm
    row: int | None = None  # number of its row of the batch
    draws: RowDraws | None = None  # there with `row`
    known: int = 0  # ids when it started; those behind were drawn here
    shared: int = 0  # of these, positions that a kept prefix answered
    width: int = 0  # positions of its prompt that a step computes
    computed: int = 0  # positions that its cache holds
    held: int = 0  # of these, those that were there when it became a row
    settled: bool = False  # all that was known is computed
    cached: int | None = None  # prompt tokens that a kept prefix answered; None: never ran
    reported: bool = False  # `cached` has gone out
    scores: list[TokenLogprob] = field(default_factory=list)  # of the prompt
    steps: int = 0  # that it took part in
    rows: int = 0  # of all these together

    @classmethod
    def of(cls, submission: Submission, spec: BackendSpec) -> Sequence:
        """A submission that is new. An end of text ends a bound answer whatever its request says:
        behind a complete answer nothing else can come.
        """
        sampling = submission.sampling
        own = () if sampling.ignore_eos and sampling.grammar is None else spec.stop_ids
        return cls(
            submission,
            frozenset((*own, *sampling.stop_token_ids)),
            [*submission.prompt, *submission.received],
        )

    @property
    def limit(self) -> int:
        """`ids` never get longer."""
        return len(self.submission.prompt) + self.submission.max_new_tokens

    @property
    def draws_nothing(self) -> bool:
        """Whether the prompt is all that is asked for."""
        return not self.submission.max_new_tokens

    @property
    def waits(self) -> bool:
        """Whether it may not be admitted, for its grammar's sake."""
        return self.follower is not None and self.follower.waits

    @property
    def score_from(self) -> int | None:
        """First prompt position whose successor is to be scored. Scores come with the first token,
        so whoever has tokens has them.
        """
        wanted = self.submission.wants.prompt_logprobs_from
        return None if self.submission.received else wanted

    @property
    def match_limit(self) -> int:
        """Positions that a kept prefix may answer: the last id is computed again, and so are scored
        positions.
        """
        last = len(self.ids) - 1
        return last if self.score_from is None else min(last, self.score_from)

    @property
    def read_until(self) -> int:
        """Where we stop to read its prompt and mlx-lm takes over; 0: it reads all."""
        if self.draws_nothing:
            return len(self.ids)
        return 0 if self.score_from is None else len(self.ids) - 1

    def begin(self, shared: int, width: int) -> None:
        """Start to run, with `shared` positions known to its cache."""
        self.known = len(self.ids)
        self.shared = self.computed = shared
        self.width = width
        self.cached = min(shared, len(self.submission.prompt))

    def is_late(self, now: float) -> bool:
        """Whether its deadline has passed before it ran. `now` is time.monotonic()."""
        deadline = self.submission.deadline
        return deadline is not None and deadline <= now

    def new_draws(self) -> RowDraws:
        """Its draws, from here on."""
        return RowDraws(self.submission, sorted(self.stop_ids), self.follower)

    def take(self, token: int) -> Delta:
        """Add a token. The news of it, with the end that it brings."""
        assert self.draws is not None, "a token of a row"
        self.ids.append(token)
        logprobs = self.draws.score(token)
        finish = self._ended(token)
        if finish is not None and finish.reason == "error":
            return self.news(finish=finish)
        return self.news((token,), finish, logprobs)

    def _ended(self, token: int) -> Finish | None:
        finish = None
        if token in self.stop_ids:
            finish = Finish("stop", matched=token)
        elif len(self.ids) == self.limit:
            finish = Finish("length")
        return finish if self.follower is None else self.follower.ended(finish)

    def news(
        self,
        tokens: tuple[int, ...] = (),
        finish: Finish | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> Delta:
        """A delta, with what comes once with the first, and with the last."""
        delta = Delta(self.submission.id, tokens, finish, logprobs=logprobs)
        if not self.reported:
            self.reported = True
            delta.cached = self.cached or 0
            delta.prompt_logprobs = self.scores if self.settled else ()
        if finish is not None:
            delta.work = self.work()
        return delta

    def progress(self) -> Delta | None:
        """News of a prompt that goes on, for whoever asked for them."""
        if not self.submission.wants.progress or self.computed >= len(self.ids):
            return None
        return Delta(self.submission.id, prefilled=self.computed)

    def work(self) -> Work:
        """What it has taken so far. Nobody yields here."""
        return Work(self.steps, self.rows, 0, min(self.computed, self.known) - self.shared)
