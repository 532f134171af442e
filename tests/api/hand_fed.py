"""A pool that a test feeds by hand: which tokens come when is the test's to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from api.answers import Answers, Ask
from backend.interface import BackendSpec, Finish, SamplingParams, TokenLogprob, Wants
from backend.tokenizer import ByteTokenizer
from engine.live_request import LiveRequest
from engine.multi_device import EnginePool
from tests.api.doubles import SPEC

LENGTH = Finish("length")
BROKEN = Finish("error", message="the engine died: out of luck")
PROMPT = (256, 104, 105)  # "hi"
SCORED = Wants(logprobs=True, prompt_logprobs_from=0)


def scores(tokens: Sequence[int]) -> list[TokenLogprob]:
    """A log-probability for each token, that says which one it belongs to."""
    return [TokenLogprob(token, -float(place)) for place, token in enumerate(tokens)]


PROMPT_SCORES = scores(PROMPT)


@dataclass(eq=False)
class HandFedPool:
    """What answers ask of an `EnginePool`."""

    refusal: Exception | None = None  # what `submit` raises
    warnings: list[str] = field(default_factory=list)  # what it returns
    requests: list[LiveRequest] = field(default_factory=list)  # all that it took, in order
    ended: list[tuple[int, Finish]] = field(default_factory=list)  # by the front: which, and how

    @property
    def spec(self) -> BackendSpec:
        return SPEC

    @property
    def going(self) -> int:
        """Requests that have no finish."""
        return sum(request.finish is None for request in self.requests)

    def submit(self, requests: Sequence[LiveRequest]) -> list[str]:
        if self.refusal is not None:
            raise self.refusal
        for request in requests:
            self.spec.check(request.submission)
        self.requests += requests
        return list(self.warnings)

    def end(self, request: LiveRequest, finish: Finish) -> None:
        if request.finish is None:
            request.finish = finish
            self.ended.append((self.requests.index(request), finish))

    def feed(
        self,
        index: int,
        tokens: Sequence[int] = b"",
        finish: Finish | None = None,
        logprobs: Sequence[TokenLogprob] = (),
        prompt_logprobs: Sequence[TokenLogprob] = (),
    ) -> bool:
        """Bring news of one request. Returns whether it went on: one that has ended gets none."""
        request = self.requests[index]
        if request.finish is not None:
            return False
        request.received += tokens
        request.logprobs += logprobs
        request.prompt_logprobs += prompt_logprobs
        request.finish = finish
        request.notify(request)
        return True


def ask(*stop: str, n: int = 1, seed: int | None = None, max_new_tokens: int | None = 40) -> Ask:
    """A prompt of three tokens, and the stop strings of its answers."""
    return Ask(PROMPT, SamplingParams(max_new_tokens=max_new_tokens), stop, seed, n)


def opened(pool: HandFedPool, *asks: Ask) -> Answers:
    """Answers under way."""
    answers = Answers("gen-1", cast(EnginePool, pool))
    answers.open(asks, ByteTokenizer(), owner="somebody", default_length=16)
    return answers
