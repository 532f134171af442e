"""Drives a backend through its protocol and hears every answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from backend.interface import Backend, Delta, Finish, Submission, TokenLogprob


@dataclass
class Answer:
    """All that was heard of one submission."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    pooled: list[float] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Take news, and see that they come when they may."""
        assert not self.finishes, "news of an ended sequence"
        if delta.prefilled is not None:
            assert not self.cached, "the prompt goes on"
            self.prefilled.append(delta.prefilled)
            return
        assert (delta.cached is None) == bool(self.cached), "cached comes once, with the first"
        assert delta.tokens or delta.finish, "a delta says nothing"
        assert not (delta.prompt_logprobs and self.tokens), "scores come with the first token"
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.cached += [] if delta.cached is None else [delta.cached]
        self.finishes += [] if delta.finish is None else [delta.finish]
        self.pooled += delta.pooled


class Driver:
    """A backend and what came out of it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.spec = backend.spec
        self.answers: dict[str, Answer] = {}
        self.steps = 0
        self.step_tokens = 0

    def submit(self, submission: Submission) -> None:
        self.spec.check(submission)
        self.answers[submission.id] = Answer()
        self.backend.submit(submission)

    def advance(self) -> None:
        output = self.backend.advance(0.01)
        self.steps += 1
        self.step_tokens += output.step_tokens
        for delta in output.deltas:
            self.answers[delta.id].add(delta)

    @property
    def idle(self) -> bool:
        load = self.backend.load()
        return not (load.running or load.waiting)

    def drain(self, limit: int = 2000) -> None:
        """Advance until all is answered, and see that nothing is held then."""
        while not (self.idle and all(answer.finishes for answer in self.answers.values())):
            self.advance()
            assert self.steps < limit, "starved"
        load = self.backend.load()
        assert load.pages_leased == 0, "pages are still leased"
        assert load.pages_free + load.pages_cached == load.pages_total, "pages are missing"

    def run(self, *submissions: Submission) -> list[Answer]:
        for submission in submissions:
            self.submit(submission)
        self.drain()
        return [self.answers[submission.id] for submission in submissions]
