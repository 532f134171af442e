"""SGLang as a backend: submissions become its requests, what comes of them becomes our deltas."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from concurrent.futures import TimeoutError as LateError  # the builtin one from Python 3.11 on
from typing import Any

from backend.interface import (
    EXPIRED,
    BackendSpec,
    Delta,
    Finish,
    Load,
    SamplingParams,
    StepOutput,
    Submission,
)
from backend.sglang.answers import Answer
from backend.sglang.books import Books
from backend.sglang.bridge import Bridge, News
from backend.sglang.fields import Requests, stop_ids
from backend.sglang.groups import Groups
from backend.sglang.runtime import Engine, FlushResult

logger = logging.getLogger(__name__)

FLUSH_S = 10.0  # for SGLang to come to rest, where our books say that nothing runs
LATE_S = 5.0  # longer than that it does not answer at all
WARM, WARM_WAIT_S = "warm", 1.0


class SglangBackend:
    """A `Backend` over SGLang. One owner (the engine), one thread."""

    def __init__(self, spec: BackendSpec, bridge: Bridge, books: Books, requests: Requests) -> None:
        self.bridge = bridge
        self._spec = spec
        self._books = books
        self._requests = requests
        self._answers: dict[str, Answer] = {}  # until their finish, by our id
        self._by_rid: dict[str, Answer] = {}  # those that SGLang has, by its own
        self._groups = Groups()
        self._news: list[Delta] = []
        self._numbers = itertools.count()
        self._since = time.monotonic()  # the last news came, or the first work

    @property
    def spec(self) -> BackendSpec:
        """What was decided at start-up."""
        return self._spec

    # Requests

    def submit(self, submission: Submission) -> None:
        """Let SGLang have a submission, or hold it back until its group's prompt is cached."""
        if not self._answers:
            self._since = time.monotonic()
        length = submission.max_new_tokens - len(submission.received)
        ends = stop_ids(submission.sampling, self._spec.stop_ids)
        answer = self._answers[submission.id] = Answer(submission, ends, length)
        if submission.received and length <= 0:
            self._end(answer, Finish("length"))
        elif not self._groups.holds(answer):
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        submission = answer.submission
        self._name(answer)
        known = (*submission.prompt, *submission.received)
        self._books.enter(answer.rid, submission.namespace, known)
        self.bridge.ask(self._requests.generate(answer.rid, submission, answer.ends))

    def _name(self, answer: Answer) -> None:
        """Give it a request id: ours, behind a number that no other has. SGLang ends with an id all
        that begin with it, and knows an id for a while after its end.
        """
        answer.rid = f"{next(self._numbers):012d}/{answer.id}"
        self._by_rid[answer.rid] = answer

    def _release(self, answer: Answer) -> None:
        """Let those go that waited for the prompt of `answer`; where it did not come to that, one
        of them goes ahead.
        """
        for sibling in self._groups.release(answer):
            if answer.begun or not self._groups.holds(sibling):
                self._send(sibling)

    def cancel(self, id: str) -> None:
        """End an answer with finish "abort"; what SGLang still says of it is dropped."""
        if id in self._answers:
            self._end(self._answers[id], Finish("abort"))

    def _end(self, answer: Answer, finish: Finish) -> None:
        """End an answer from here."""
        if answer.rid:
            self.bridge.abort(answer.rid)
        self._groups.remove(answer)
        self._tell(answer, answer.end(finish))

    def _tell(self, answer: Answer, delta: Delta) -> None:
        self._news.append(delta)
        if delta.finish is not None:
            del self._answers[answer.id]
            self._drop_request(answer)
            self._release(answer)

    def _drop_request(self, answer: Answer) -> None:
        """News of its request is of no interest any more. It may have none."""
        if self._by_rid.pop(answer.rid, None) is not None and answer.rid in self._books:
            self._books.leave(answer.rid)

    # News

    def advance(self, wait: float) -> StepOutput:
        """Collect what came. Blocks for `wait` seconds at most, while something is asked for.
        Raises DeviceLost.
        """
        self._expire(time.monotonic())
        output = StepOutput()
        output.step_tokens = self._collect(0.0 if self._news or not self._answers else wait)
        if output.step_tokens:
            now = time.monotonic()
            output.step_seconds, self._since = now - self._since, now
        output.deltas, self._news = self._news, []
        output.entered, output.evicted = self._books.events()
        return output

    def _expire(self, now: float) -> None:
        """End those whose deadline passed before they began."""
        for answer in list(self._answers.values()):
            deadline = answer.submission.deadline
            if deadline is not None and deadline <= now and self._waits(answer):
                self._end(answer, EXPIRED)

    def _waits(self, answer: Answer) -> bool:
        return not answer.begun and not (answer.rid and self._books.runs(answer.rid))

    def _collect(self, wait: float) -> int:
        """Take what came. Returns the positions that were computed for it."""
        computed = sum([self._hear(news) for news in self.bridge.collect(wait)])
        self._books.steps += bool(computed)
        return computed

    def _hear(self, news: News) -> int:
        """Take one piece of news. Returns the positions that were computed for it."""
        answer = self._by_rid.get(news.rid)
        if answer is None:
            return 0  # its answer has ended already
        if news.output is None:
            self._tell(answer, answer.end(Finish("error", message=f"SGLang: {news.error}")))
            return 0
        if answer.scoring:
            self._tell(answer, answer.scored(news.output))
            return 0
        return self._read(answer, news.output)

    def _read(self, answer: Answer, output: Mapping[str, Any]) -> int:
        """Take tokens of an answer. Returns as `_hear` does."""
        begins, retractions = not answer.count, answer.retractions
        news = answer.read(output)
        computed = len(news.tokens)
        self._books.take(answer.rid, news.tokens)
        if answer.retractions != retractions:
            self._books.preemptions += answer.retractions - retractions
        if begins and answer.count:
            known = len(answer.submission.prompt) + len(answer.submission.received)
            computed += known - (news.cached or 0)
            self._release(answer)
        if news.finish and output["meta_info"]["finish_reason"] is None:
            self.bridge.abort(answer.rid)  # SGLang would go on
        told = answer.tell(news)
        if told is not None:
            self._tell(answer, told)
        elif answer.scoring:
            self._score(answer)
        return computed

    def _score(self, answer: Answer) -> None:
        """Ask for the log-probabilities of an answer that is complete, as those of a prompt."""
        ids = list(self._books.ids(answer.rid))
        self._drop_request(answer)
        self._name(answer)
        start = len(answer.submission.prompt) + len(answer.submission.received)
        self.bridge.ask(self._requests.score(answer.rid, answer.submission, ids, start))

    # The rest of the protocol

    def fileno(self) -> int:
        """Readable when something came, or SGLang is lost."""
        return self.bridge.fileno()

    def load(self) -> Load:
        """How busy SGLang is, by our books."""
        return self._books.load(len(self._answers))

    def warm(self, tokens: int) -> int:
        """Generate `tokens` tokens for nobody, at most what the context and the pages hold. Returns
        how many.
        """
        spec = self._spec
        room = min(spec.max_model_len, spec.pages * spec.page_tokens) - 1
        sampling = SamplingParams(max_new_tokens=min(tokens, room), ignore_eos=True)
        self.submit(Submission(WARM, (0,), sampling, seed=0, namespace=WARM))
        answer = self._answers[WARM]
        while WARM in self._answers:
            self._collect(WARM_WAIT_S)
        self._news = [delta for delta in self._news if delta.id != WARM]
        return answer.count

    def prepare(self) -> bool:
        """Nothing to prepare: SGLang does it when it starts."""
        return False

    def flush(self) -> int:
        """Empty SGLang's cache, which it does only while nothing runs. Returns the pages freed."""
        if self._answers:
            logger.info("the cache was not flushed: SGLang does that only while nothing runs")
            return 0
        try:
            result = self.bridge.call(_flush, FLUSH_S + LATE_S)
        except LateError:
            return 0
        return self._books.flush() if result.success else 0

    def close(self) -> None:
        """End SGLang: no process and no memory of it is left."""
        self.bridge.close()


async def _flush(engine: Engine) -> FlushResult:
    return await engine.tokenizer_manager.flush_cache(timeout_s=FLUSH_S)
