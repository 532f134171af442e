"""What has happened so far: counters, distributions and rolling averages of one server.

Owned by the pool, touched on the event loop only. Times are `time.monotonic()` seconds, given by
the caller. What was observed stays counted whatever becomes of its request: each first token, each
gap between tokens, each wait for an engine. How long a whole answer took is asked only of answers
that came to their own end (stop, length): one that was aborted, abandoned or failed counts by its
finish reason, and enters no average.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import get_args

from backend.interface import FinishReason
from engine.live_request import LiveRequest
from ipc.messages import Step

# Upper bounds of buckets; a quantile is read between two of them.
SECONDS: tuple[float, ...] = tuple(  # 0.1 milliseconds to 700 seconds
    step * 10**power / 10_000 for power in range(7) for step in (1, 2, 3, 5, 7)
)
STEP_TOKENS = tuple(float(1 << power) for power in range(17))

OWN_ENDS = frozenset({"stop", "length"})
AVERAGES = ("ttft_ms", "itl_ms", "e2e_ms", "queue_ms", "output_tokens", "request_tokens_per_s")

RATE_SPAN_S = 10.0  # that the server's tokens a second are counted over
RATE_SLICE_S = 0.1  # how finely


class Distribution:
    """How often values fell between bounds. A value that equals a bound lies below it."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds  # ascending
        self.counts = [0] * (len(bounds) + 1)  # the last: above every bound
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Values so far."""
        return sum(self.counts)

    def add(self, value: float, times: int = 1) -> None:
        """Note a value that was seen `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[int]:
        """Values up to each bound, and up to infinity."""
        return list(accumulate(self.counts))

    def quantile(self, share: float) -> float | None:
        """The value that `share` of all values (0 to 1) do not exceed; None: there was none.

        Values are taken to lie evenly between two bounds, the first from 0 on. Those above every
        bound count as the last one.
        """
        wanted = share * self.count
        below, lower = 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= wanted:
                return lower + (bound - lower) * (wanted - below) / count
            below, lower = below + count, bound
        return lower if self.count else None


class Statistics:
    """The numbers of one server since it started. None of its totals ever goes down."""

    def __init__(self, window: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`window`: how many answers a rolling average is over. `clock` says when one asks."""
        self.requests_accepted = 0
        self.requests: dict[str, int] = dict.fromkeys(get_args(FinishReason), 0)  # ended
        self.rejections: Counter[str] = Counter()  # by reason
        self.prompt_tokens = 0  # of ended requests that had an engine
        self.cached_tokens = 0  # of those, answered by the cache
        self.generated_tokens = 0
        self.restarts = 0  # of engines
        self.phases: dict[int, dict[str, float]] = {}  # by replica: seconds of its last start
        self.time_to_first_token = Distribution(SECONDS)
        self.inter_token = Distribution(SECONDS)
        self.end_to_end = Distribution(SECONDS)
        self.queue_time = Distribution(SECONDS)
        self.step_seconds = Distribution(SECONDS)
        self.step_tokens = Distribution(STEP_TOKENS)
        self._clock = clock
        self._past_preemptions = 0  # of engines that are gone
        self._preemptions: dict[int, int] = {}  # by replica: of the engine that is there
        self._recent = {name: deque[float](maxlen=window) for name in AVERAGES}
        # (time, tokens generated before it), a slice or more apart
        self._marks = deque[tuple[float, int]](maxlen=round(RATE_SPAN_S / RATE_SLICE_S) + 1)
        self._next_mark = 0.0

    @property
    def preemptions(self) -> int:
        """Sequences that had to yield, on engines that are gone too."""
        return self._past_preemptions + sum(self._preemptions.values())

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens a second of the whole server over the last RATE_SPAN_S seconds."""
        start = self._clock() - RATE_SPAN_S
        marks = (before for when, before in self._marks if when >= start)
        return (self.generated_tokens - next(marks, self.generated_tokens)) / RATE_SPAN_S

    def accepted(self, request: LiveRequest) -> None:
        """The request will have a finish."""
        self.requests_accepted += 1

    def rejected(self, reason: str) -> None:
        """A request was not accepted."""
        self.rejections[reason] += 1

    def placed(self, request: LiveRequest) -> None:
        """The request was given to an engine; `placed` is set."""
        assert request.placed is not None
        self.queue_time.add(request.placed - request.submission.arrival)

    def received(self, request: LiveRequest, count: int, now: float) -> None:
        """`count` tokens came at once; `last_token` is still that of the tokens before."""
        if not count:
            return
        if now >= self._next_mark:
            self._marks.append((now, self.generated_tokens))
            self._next_mark = now + RATE_SLICE_S
        self.generated_tokens += count
        last = request.last_token
        if last is None:
            self.time_to_first_token.add(now - request.submission.arrival)
        else:
            self.inter_token.add((now - last) / count, count)

    def finished(self, request: LiveRequest) -> None:
        """The request has ended; `finish` and `ended` are set."""
        assert request.finish is not None
        self.requests[request.finish.reason] += 1
        if request.placed is not None:
            self.prompt_tokens += len(request.submission.prompt)
            self.cached_tokens += request.cached
        if request.finish.reason in OWN_ENDS:
            self._answered(request)

    def _answered(self, request: LiveRequest) -> None:
        """An answer came to its own end: what it was like for its client."""
        assert request.ended is not None
        arrival, tokens = request.submission.arrival, len(request.received)
        seconds = request.ended - arrival
        self.end_to_end.add(seconds)
        self._recent["e2e_ms"].append(seconds * 1e3)
        self._recent["output_tokens"].append(tokens)
        if seconds > 0:
            self._recent["request_tokens_per_s"].append(tokens / seconds)
        if request.placed is not None:
            self._recent["queue_ms"].append((request.placed - arrival) * 1e3)
        first, last = request.first_token, request.last_token
        if first is not None and last is not None:
            self._recent["ttft_ms"].append((first - arrival) * 1e3)
            if tokens > 1:
                self._recent["itl_ms"].append((last - first) / (tokens - 1) * 1e3)

    def step(self, replica: int, message: Step) -> None:
        """An engine told what a step brought, or what was decided between two steps."""
        self._preemptions[replica] = message.load.preemptions
        if message.step_tokens:
            self.step_seconds.add(message.step_seconds)
            self.step_tokens.add(message.step_tokens)

    def restarted(self, replica: int) -> None:
        """An engine is lost; the one that takes its place counts from zero."""
        self.restarts += 1
        self._past_preemptions += self._preemptions.pop(replica, 0)

    def phase(self, replica: int, name: str, seconds: float) -> None:
        """A phase of an engine's start has ended."""
        self.phases.setdefault(replica, {})[name] = seconds

    def averages(self) -> dict[str, float | None]:
        """Means over the last `window` answers that have the number; None: there was none.

        `output_tokens_per_s` is the whole server's, `request_tokens_per_s` one answer's from its
        arrival to its end.
        """
        means = {
            name: sum(values) / len(values) if values else None
            for name, values in self._recent.items()
        }
        return {**means, "output_tokens_per_s": self.output_tokens_per_s}

    def snapshot(self) -> dict[str, object]:
        """Every total under its name in `/metrics`, and the averages: ready to be JSON."""
        return {
            "requests_accepted_total": self.requests_accepted,
            "requests_total": dict(self.requests),
            "rejected_total": dict(self.rejections),
            "prompt_tokens_total": self.prompt_tokens,
            "cached_tokens_total": self.cached_tokens,
            "generated_tokens_total": self.generated_tokens,
            "preemptions_total": self.preemptions,
            "engine_restarts_total": self.restarts,
            "startup_phase_seconds": {
                str(replica): dict(phases) for replica, phases in self.phases.items()
            },
            "averages": self.averages(),
        }
