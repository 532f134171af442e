"""Percentiles and the fold of a run, against the standard library and plain sums."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, strategies as st

from bench.summary import (
    Percentiles,
    Record,
    median_index,
    percentile,
    spread,
    summarise,
)

times = st.floats(min_value=0, max_value=1e6)


@given(st.lists(times, min_size=2), st.integers(min_value=1, max_value=99))
def test_percentiles_equal_the_inclusive_quantiles(values: list[float], percent: int) -> None:
    expected = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    assert percentile(values, percent) == pytest.approx(expected)


@given(times, st.integers(min_value=0, max_value=100))
def test_every_percentile_of_one_value_is_that_value(value: float, percent: int) -> None:
    assert percentile([value], percent) == value


def test_percentiles_of_nothing_are_none_and_of_seconds_come_in_milliseconds() -> None:
    assert Percentiles.of_seconds([]) == Percentiles(None, None, None)
    assert Percentiles.of_seconds([0.001, 0.003]) == Percentiles(2.0, 2.8, 2.98)


@given(st.lists(times, min_size=1))
def test_the_median_run_is_the_lower_median(values: list[float]) -> None:
    assert values[median_index(values)] == statistics.median_low(values)


def test_the_spread_is_a_share_of_the_median() -> None:
    assert spread([90, 100, 120]) == pytest.approx(0.3)
    assert spread([100]) == 0


def test_tokens_that_arrive_together_share_the_gap_before_them() -> None:
    record = Record(prompt_tokens=4, submitted=1.0, arrivals=[(2.0, 1), (2.5, 2), (2.75, 1)])
    assert record.first_token() == 1.0
    assert record.gaps() == [0.25, 0.25, 0.25]
    assert record.output_tokens == 4


def test_a_run_is_folded_over_its_requests() -> None:
    records = [
        Record(10, submitted=0.0, cached_tokens=8, arrivals=[(1.0, 1), (2.0, 1)], ended=2.0),
        Record(20, submitted=1.0, arrivals=[(2.0, 3)], ended=2.0),
    ]
    summary = summarise(records, duration_s=2.0)
    assert (summary.requests, summary.failed) == (2, 0)
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (30, 8, 5)
    assert (summary.output_tokens_per_s, summary.total_tokens_per_s) == (2.5, 17.5)
    assert summary.ttft_ms.p50 == 1000
    assert summary.itl_ms.p50 == 1000
    assert summary.e2e_ms.p50 == 1500


def test_failed_and_unfinished_requests_count_as_failed_and_not_in_the_latencies() -> None:
    records = [
        Record(10, submitted=0.0, arrivals=[(1.0, 1)], ended=1.0),
        Record(10, submitted=0.0, arrivals=[(9.0, 1)], ended=9.0, failure="lost"),
        Record(10, submitted=0.0),
    ]
    summary = summarise(records, duration_s=10.0)
    assert (summary.requests, summary.failed) == (3, 2)
    assert summary.e2e_ms == Percentiles(1000, 1000, 1000)
