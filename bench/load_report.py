"""What the runs of one load come to: for the card, for the last line, for the curve. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.card import percent, summary_rows
from bench.curve import Point
from bench.http_load import Load, LoadRun
from bench.summary import (
    Objective,
    Percentiles,
    Summary,
    failures_by_cause,
    median_index,
    spread,
    summarise,
)

SATURATED = 0.9  # of a core: beyond it, latencies are the client's own
SWEEP_HEADER = ("load", "tokens/s", "first token, p50 / p99", "between", "failed", "client")


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that kept the objective."""

    slo_ttft_ms: float | None
    slo_itl_ms: float | None
    requests_per_s: float
    share: float  # of all requests, those that failed included


@dataclass(frozen=True, slots=True)
class Result:
    """Several runs of one load: the one with the median throughput, and how far they differ."""

    load: dict[str, Any]  # as the report names it
    summary: Summary
    goodput: Goodput | None  # None: no objective was given
    client_cpu_share: float
    runs: list[float]  # output tokens a second of each
    failures: dict[str, list[str]]  # of all runs, by cause

    @property
    def spread(self) -> float | None:
        """Of the runs; None when nothing was answered."""
        return spread(self.runs) if self.summary.output_tokens_per_s else None

    @property
    def label(self) -> str:
        """The load as its number: of users, or of visitors a second."""
        return ", ".join(f"{value:g}" for value in self.load.values())

    def as_json(self) -> dict[str, Any]:
        """Its part of the last line."""
        return {
            **self.load,
            **asdict(self.summary),
            "goodput": self.goodput and asdict(self.goodput),
            "client_cpu_share": round(self.client_cpu_share, 4),
            "runs": self.runs,
            "spread": None if self.spread is None else round(self.spread, 4),
            "failures": {cause: len(failures) for cause, failures in self.failures.items()},
        }

    def as_point(self) -> Point:
        """Its place on the curve."""
        summary = self.summary
        return Point(self.label, summary.output_tokens_per_s, summary.ttft_ms, summary.itl_ms)

    def rows(self) -> Iterator[tuple[str, str]]:
        """The rows of its card."""
        yield from summary_rows(self.summary)
        if self.goodput is not None:
            good = self.goodput
            yield "good requests", f"{good.requests_per_s:,.2f} /s, {percent(good.share)}"
        yield "runs, spread", f"{len(self.runs)}, {percent(self.spread)}"
        yield "client's share of a core", self.client()
        for cause, failures in self.failure_rows():
            yield f"failed: {cause}", failures

    def sweep_row(self) -> tuple[str, ...]:
        """Its row among others, under SWEEP_HEADER."""
        summary = self.summary
        return (
            self.label,
            f"{summary.output_tokens_per_s:,.1f}",
            _typical_and_worst(summary.ttft_ms),
            _typical_and_worst(summary.itl_ms),
            f"{summary.failed:,}",
            self.client(),
        )

    def client(self) -> str:
        """How busy the client was, and whether that spoils the result."""
        warning = ", it measures itself" if self.client_cpu_share > SATURATED else ""
        return percent(self.client_cpu_share) + warning

    def failure_rows(self) -> Iterator[tuple[str, str]]:
        """A row for each cause, with the first failure as an example."""
        for cause, failures in self.failures.items():
            example = failures[0].removeprefix(cause).removeprefix(":").strip()
            yield cause, f"{len(failures):,}" + (f", as in: {example}" if example else "")


def fold(load: Load, runs: Sequence[LoadRun], objective: Objective) -> Result:
    """Summarise the runs of one load."""
    summaries = [summarise(run.records, run.duration_s) for run in runs]
    rates = [summary.output_tokens_per_s for summary in summaries]
    median = median_index(rates)
    return Result(
        load=load.as_json(),
        summary=summaries[median],
        goodput=_goodput(runs[median], objective),
        client_cpu_share=runs[median].client_cpu_share,
        runs=rates,
        failures=failures_by_cause(record for run in runs for record in run.records),
    )


def _typical_and_worst(times: Percentiles) -> str:
    shown = ("-" if value is None else f"{value:,.1f}" for value in (times.p50, times.p99))
    return " / ".join(shown) + " ms"


def _goodput(run: LoadRun, objective: Objective) -> Goodput | None:
    if objective == Objective():
        return None
    good = sum(map(objective.met, run.records))
    rate, share = good / run.duration_s, good / len(run.records)
    return Goodput(objective.ttft_ms, objective.itl_ms, round(rate, 3), round(share, 4))
