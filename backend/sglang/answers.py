"""One answer: what has come of it from SGLang, and what of that is told.

Owned by the backend. SGLang's news are a burst of tokens with what is known by then; a delta of
ours says each thing once, and nothing after the finish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backend.interface import Delta, Finish, Submission, TokenLogprob
from backend.sglang.fields import edits_logits, finish_of, logprobs_of

FAILED = ("abort", "error")


@dataclass(eq=False, slots=True)
class Answer:
    """From its submission to its finish."""

    submission: Submission
    ends: frozenset[int]  # ids that end it
    length: int  # tokens that may come
    rid: str = ""  # of the request that SGLang has of it; empty: none yet
    count: int = 0  # tokens that came
    retractions: int = 0
    reported: bool = False  # the cached count has gone out
    held: Delta | None = None  # of an answer that is held back: all that came
    scoring: bool = False  # it is complete but for its log-probabilities, which are asked for
    holds_back: bool = field(init=False)  # SGLang's log-probabilities would be of other logits

    def __post_init__(self) -> None:
        submission = self.submission
        self.holds_back = submission.wants.logprobs and edits_logits(submission.sampling)

    @property
    def id(self) -> str:
        return self.submission.id

    @property
    def begun(self) -> bool:
        """Whether its first token has come, so that its prompt is in the cache."""
        return self.count > 0

    def end(self, finish: Finish) -> Delta:
        """Its end without news of SGLang's. What was held back is not told."""
        cached = self._report(0) if self.held is None else self.held.cached
        return Delta(self.id, finish=finish, cached=cached)

    def read(self, output: Mapping[str, Any]) -> Delta:
        """What came. The answer ends at the first of its ends or at its length, whatever SGLang
        makes of it.
        """
        meta, first = output["meta_info"], not self.count
        came, finish = output["output_ids"], None
        reason, count = meta["finish_reason"], self.count + len(came)
        if reason is not None or count >= self.length or not self.ends.isdisjoint(came):
            came, finish = self._cut(came, reason)
            count = self.count + len(came)
        self.count = count
        self.retractions = meta.get("num_retractions", self.retractions)
        told = self.submission.wants.logprobs and not self.holds_back
        if not (first or told):
            return Delta(self.id, came, finish)  # as most are
        return Delta(
            self.id,
            came,
            finish,
            cached=self._report(min(meta.get("cached_tokens", 0), len(self.submission.prompt))),
            logprobs=_generated(came, meta) if told else (),
            prompt_logprobs=self._prompt_scores(meta) if first else (),
        )

    def _cut(
        self, came: Sequence[int], reason: dict[str, Any] | None
    ) -> tuple[Sequence[int], Finish | None]:
        """The tokens up to the end of the answer, and that end, if it is there."""
        finish = None if reason is None else finish_of(reason)
        if finish is not None and finish.reason in FAILED:
            return (), finish  # what comes with it was there before
        left = self.length - self.count
        for count, token in enumerate(came[:left], start=1):
            if token in self.ends:
                return came[:count], Finish("stop", matched=token)
        if len(came) >= left:
            return came[:left], Finish("length")
        if finish == Finish("length"):
            missing = left - len(came)
            finish = Finish("error", message=f"SGLang ended the answer {missing} tokens early")
        return came, finish

    def _report(self, cached: int) -> int | None:
        """The cached count, the first time."""
        if self.reported:
            return None
        self.reported = True
        return cached

    def _prompt_scores(self, meta: Mapping[str, Any]) -> list[TokenLogprob]:
        start = self.submission.wants.prompt_logprobs_from
        if start is None or self.submission.received:
            return []
        told, top = meta.get("input_token_logprobs", ()), meta.get("input_top_logprobs", ())
        # the first is of the position itself, which nothing was asked of
        return logprobs_of(self.submission.prompt[start + 1 :], told[1:], top[1:])

    # An answer that is held back until its log-probabilities are known

    def tell(self, news: Delta) -> Delta | None:
        """What is to be told now of what was read. None: nothing, or nothing yet."""
        if not self.holds_back:
            return news if news.tokens or news.finish else None
        if self.held is None:
            self.held = news
        else:
            self.held.tokens = [*self.held.tokens, *news.tokens]
            self.held.finish = news.finish
        finish = news.finish
        if finish is None:
            return None
        if finish.reason in FAILED:
            return self.end(finish)
        self.scoring = bool(self.held.tokens)
        return None if self.scoring else self.held

    def scored(self, output: Mapping[str, Any]) -> Delta:
        """All of it, with the log-probabilities that were asked for (`Requests.score`)."""
        assert self.held is not None
        meta = output["meta_info"]
        told, top = meta.get("input_token_logprobs", ()), meta.get("input_top_logprobs", ())
        finish = finish_of(meta["finish_reason"])
        if finish.reason in FAILED:
            return self.end(finish)
        self.held.logprobs = logprobs_of(self.held.tokens, told[1:], top[1:])
        return self.held


def _generated(came: Sequence[int], meta: Mapping[str, Any]) -> list[TokenLogprob]:
    told, top = meta.get("output_token_logprobs", ()), meta.get("output_top_logprobs", ())
    return logprobs_of(came, told, top)
