"""From the arrival times of tokens to the numbers of a benchmark. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value that `percent` of `values` do not exceed, interpolated between neighbours (method 7
    of Hyndman and Fan 1996); None of nothing.
    """
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a set of times in milliseconds; None when there is none."""

    p50: float | None
    p90: float | None
    p99: float | None

    @staticmethod
    def of_seconds(seconds: Iterable[float]) -> Percentiles:
        """The percentiles of `seconds`, in milliseconds, to the microsecond."""
        values = [1000 * second for second in seconds]
        found = (percentile(values, percent) for percent in (50, 90, 99))
        return Percentiles(*(None if value is None else round(value, 3) for value in found))


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times are seconds of one monotonic clock."""

    prompt_tokens: int
    submitted: float
    cached_tokens: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (when, how many tokens)
    ended: float | None = None
    failure: str | None = None  # a cause, and after a colon what is known of it
    counted_tokens: int | None = None  # of the answer, as its server counts; an arrival is a frame

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer: as its server counts them, else those that arrived."""
        if self.counted_tokens is not None:
            return self.counted_tokens
        return sum(count for _, count in self.arrivals)

    @property
    def failed(self) -> bool:
        """Whether it ended without its answer, or not at all."""
        return self.failure is not None or self.ended is None

    def first_token(self) -> float | None:
        """Seconds until the first token."""
        return self.arrivals[0][0] - self.submitted if self.arrivals else None

    def gaps(self) -> list[float]:
        """Seconds between a token and the one before it, for all but the first arrival.

        Tokens that arrive together share the time since the arrival before.
        """
        return [
            (when - before) / count
            for (before, _), (when, count) in zip(self.arrivals, self.arrivals[1:], strict=False)
            for _ in range(count)
        ]

    def mean_gap(self) -> float | None:
        """Seconds a token after the first took on average; None where there is no such token."""
        if not self.arrivals or self.output_tokens < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run of a workload came to. Latencies are of the requests that did not fail."""

    requests: int
    failed: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int  # of the prompts, answered by the prefix cache
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Percentiles  # submission to first token
    itl_ms: Percentiles  # between tokens
    e2e_ms: Percentiles  # submission to end


def summarise(records: Sequence[Record], duration_s: float) -> Summary:
    """Fold the requests of one run that took `duration_s`."""
    good = [record for record in records if not record.failed]
    prompt_tokens = sum(record.prompt_tokens for record in good)
    output_tokens = sum(record.output_tokens for record in records)
    first = (record.first_token() for record in good)
    return Summary(
        requests=len(records),
        failed=len(records) - len(good),
        duration_s=round(duration_s, 4),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(record.cached_tokens for record in good),
        output_tokens=output_tokens,
        output_tokens_per_s=round(output_tokens / duration_s, 2),
        total_tokens_per_s=round((prompt_tokens + output_tokens) / duration_s, 2),
        ttft_ms=Percentiles.of_seconds(time for time in first if time is not None),
        itl_ms=Percentiles.of_seconds(gap for record in good for gap in record.gaps()),
        e2e_ms=Percentiles.of_seconds(
            record.ended - record.submitted for record in good if record.ended is not None
        ),
    )


def failures_by_cause(records: Iterable[Record]) -> dict[str, list[str]]:
    """Every failure, under its cause; the most frequent cause first."""
    causes: dict[str, list[str]] = {}
    for record in records:
        if record.failed:
            failure = record.failure or "no end: nothing was heard of it"
            causes.setdefault(failure.partition(":")[0], []).append(failure)
    return dict(sorted(causes.items(), key=lambda each: -len(each[1])))


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must keep to count as good."""

    ttft_ms: float | None = None  # the longest time to the first token
    itl_ms: float | None = None  # the longest time between tokens, on the request's average

    def met(self, record: Record) -> bool:
        """Whether `record` kept it. A failed request never does."""
        if record.failed:
            return False
        first, gap = record.first_token(), record.mean_gap()
        if self.ttft_ms is not None and (first is None or 1000 * first > self.ttft_ms):
            return False
        return self.itl_ms is None or gap is None or 1000 * gap <= self.itl_ms


def median_index(values: Sequence[float]) -> int:
    """Where the median stands in `values`; of an even number the lower one of the two."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return order[(len(values) - 1) // 2]


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest, as a share of the median."""
    return (max(values) - min(values)) / values[median_index(values)]
