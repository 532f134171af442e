"""An engine over a backend that does as it is told, and what was heard of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from backend.interface import BackendSpec, Delta, Finish, Load, StepOutput, Submission
from config import BackendSettings, BatchSettings, CacheSettings, FakeSettings, QueueSettings
from engine.engine import Engine
from engine.llm import Answer, TextDelta
from engine.opening import open_backend

ROWS = 3
ABORT = Finish("abort")
LENGTH = Finish("length")


@dataclass
class Scripted:
    """A backend that finishes `pace` submissions a step, oldest first, and fails when told to."""

    spec: BackendSpec
    pace: int = 1
    held: list[str] = field(default_factory=list)
    began: list[str] = field(default_factory=list)
    news: list[Delta] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    most_held: int = 0
    calls: int = 0
    fail_submit: Exception | None = None
    fail_advance: Exception | None = None
    to_prepare: int = 0

    def submit(self, submission: Submission) -> None:
        if self.fail_submit is not None:
            raise self.fail_submit
        self.began.append(submission.id)
        self.held.append(submission.id)
        self.most_held = max(self.most_held, len(self.held))

    def cancel(self, id: str) -> None:
        if id in self.held:
            self.held.remove(id)
            self.news.append(Delta(id, finish=ABORT, cached=0))

    def advance(self, wait: float) -> StepOutput:
        self.calls += 1
        self.waits.append(wait)
        if self.fail_advance is not None:
            raise self.fail_advance
        done, self.held = self.held[: self.pace], self.held[self.pace :]
        deltas = [*self.news, *(Delta(id, (7,), LENGTH, cached=0) for id in done)]
        self.news = []
        return StepOutput(deltas)

    def fileno(self) -> int | None:
        return None

    def load(self) -> Load:
        running = min(len(self.held), self.spec.max_running)
        return Load(running, len(self.held) - running, 0, 0, 0, 0, 0, 0)

    def warm(self, tokens: int) -> int:
        return tokens

    def prepare(self) -> bool:
        self.to_prepare -= 1
        return self.to_prepare >= 0

    def flush(self) -> int:
        return 0

    def close(self) -> None:
        self.calls = -1


def fake_settings(**fake: int) -> BackendSettings:
    return BackendSettings(
        impl="fake",
        cache=CacheSettings(page_tokens=4, budget_tokens=256),
        batch=BatchSettings(max_running=ROWS, max_step_tokens=32),
        fake=FakeSettings.model_validate(fake),
    )


class House:
    """An engine, and what was heard of each submission."""

    def __init__(self, backend: Scripted | None = None, max_queued: int = 0, **fake: int) -> None:
        chosen = backend or open_backend(fake_settings(**fake))
        self.engine = Engine(chosen, QueueSettings(max_queued=max_queued))
        self.tokens: dict[str, list[int]] = {}
        self.finishes: dict[str, list[Finish]] = {}

    def submit(self, *submissions: Submission) -> None:
        for submission in submissions:
            self.engine.submit(submission)
            self.tokens[submission.id], self.finishes[submission.id] = [], []

    def step(self, wait: float = 0.0) -> None:
        for delta in self.engine.step(wait).deltas:
            assert not self.finishes[delta.id], "news of an ended submission"
            self.tokens[delta.id] += delta.tokens
            self.finishes[delta.id] += [] if delta.finish is None else [delta.finish]

    def drain(self) -> None:
        for _ in range(1000):
            if self.engine.idle:
                break
            self.step()
        assert self.engine.idle, "somebody was left waiting"
        self.step()
        assert all(len(finishes) == 1 for finishes in self.finishes.values())

    def reasons(self) -> dict[str, str]:
        return {id: finish.reason for id, (finish,) in self.finishes.items()}


def fold(pieces: Sequence[TextDelta]) -> Answer:
    """A streamed answer as a whole one."""
    assert [piece.finish is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    finish = pieces[-1].finish
    assert finish is not None
    return Answer(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        finish,
        pieces[-1].prompt_tokens,
        pieces[-1].cached_tokens,
        [each for piece in pieces for each in piece.logprobs],
        [each for piece in pieces for each in piece.prompt_logprobs],
    )
