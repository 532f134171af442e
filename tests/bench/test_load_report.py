"""What runs come to, by hand-made records."""

from __future__ import annotations

import json

import pytest

from bench.http_load import ClosedLoop, LoadRun, OpenLoop
from bench.load_report import SWEEP_HEADER, Goodput, fold
from bench.summary import Objective, Record, failures_by_cause, summarise


def record(first: float, tokens: int = 5, gap: float = 0.1, failure: str | None = None) -> Record:
    """Asked at 0, its first frame at `first`, and then a frame of two tokens after each gap."""
    frames = [(first + number * gap, 1) for number in range(1 + tokens // 2)]
    return Record(
        prompt_tokens=10,
        submitted=0.0,
        arrivals=frames,
        ended=frames[-1][0],
        failure=failure,
        counted_tokens=tokens,
    )


FULL = "HTTP 429 queue_full: 7 wait"
GOOD, LATE, SLOW = record(0.2), record(0.9), record(0.2, gap=0.5)


def test_tokens_are_those_that_the_server_counts_and_gaps_those_between_frames() -> None:
    summary = summarise([record(0.5, tokens=5)], duration_s=2.0)
    assert (summary.output_tokens, summary.output_tokens_per_s) == (5, 2.5)
    assert summary.itl_ms.p50 == 100
    assert summary.ttft_ms.p50 == 500


def test_the_mean_gap_is_over_tokens_not_frames() -> None:
    assert record(0.5, tokens=5).mean_gap() == pytest.approx(0.2 / 4)
    assert record(0.5, tokens=1).mean_gap() is None
    assert Record(prompt_tokens=1, submitted=0.0).mean_gap() is None


@pytest.mark.parametrize(
    ("objective", "met"),
    [
        (Objective(), [True, True, True]),
        (Objective(ttft_ms=500), [True, False, True]),
        (Objective(itl_ms=100), [True, True, False]),
        (Objective(ttft_ms=500, itl_ms=100), [True, False, False]),
        (Objective(ttft_ms=200, itl_ms=250), [True, False, True]),
    ],
)
def test_an_objective_is_met_by_each_request_or_not(objective: Objective, met: list[bool]) -> None:
    assert [objective.met(each) for each in (GOOD, LATE, SLOW)] == met


def test_a_failed_request_meets_no_objective_and_one_token_has_no_gap_to_miss() -> None:
    assert not Objective().met(record(0.1, failure=FULL))
    assert not Objective(ttft_ms=100).met(Record(1, 0.0, ended=1.0))
    assert Objective(itl_ms=1).met(record(0.1, tokens=1))


def test_failures_stand_under_their_cause_the_most_frequent_first() -> None:
    records = [record(0.1, failure="timeout: no end within 5 s"), GOOD]
    records += [record(0.1, failure=f"HTTP 429 queue_full: {depth} wait") for depth in (7, 8)]
    records += [Record(1, 0.0)]
    causes = failures_by_cause(records)
    assert list(causes) == ["HTTP 429 queue_full", "timeout", "no end"]
    assert causes["HTTP 429 queue_full"] == [FULL, "HTTP 429 queue_full: 8 wait"]


def test_the_median_run_is_shown_with_the_failures_of_all() -> None:
    failing = [GOOD, record(0.1, failure=FULL)]
    runs = [LoadRun([GOOD, LATE], 4.0, 0.1), LoadRun([GOOD, SLOW], 2.0, 0.2)]
    result = fold(ClosedLoop(2), [*runs, LoadRun(failing, 1.0, 0.3)], Objective(ttft_ms=500))
    assert result.runs == [2.5, 5.0, 10.0]
    assert result.spread == pytest.approx(1.5)
    assert (result.summary.output_tokens_per_s, result.client_cpu_share) == (5.0, 0.2)
    assert result.goodput == Goodput(500, None, requests_per_s=1.0, share=1.0)
    assert result.failures == {"HTTP 429 queue_full": [FULL]}
    assert ("failed: HTTP 429 queue_full", "1, as in: 7 wait") in list(result.rows())


def test_the_json_names_the_load_and_counts_failures_by_cause() -> None:
    run = LoadRun([GOOD, record(0.1, failure=FULL)], 2.0, 0.25)
    report = fold(OpenLoop(1.5, seed=0), [run], Objective()).as_json()
    assert json.loads(json.dumps(report)) == report
    assert report["request_rate"] == 1.5
    assert report["failures"] == {"HTTP 429 queue_full": 1}
    assert (report["requests"], report["failed"]) == (2, 1)
    assert report["goodput"] is None
    assert report["client_cpu_share"] == 0.25


def test_a_run_without_any_answer_is_a_result_too() -> None:
    lost = Record(0, submitted=0.0, ended=1.0, failure="connection failed: refused")
    result = fold(ClosedLoop(1), [LoadRun([lost], 1.0, 0.1)] * 2, Objective(ttft_ms=1))
    assert result.spread is None
    assert result.as_json()["ttft_ms"] == {"p50": None, "p90": None, "p99": None}
    assert result.goodput == Goodput(1, None, 0.0, 0.0)
    assert len(list(result.rows())) > 8
    assert result.as_point().ttft_ms.p50 is None


def test_a_row_of_a_sweep_has_a_cell_for_each_heading() -> None:
    result = fold(ClosedLoop(16), [LoadRun([GOOD], 1.0, 0.5)], Objective())
    row = result.sweep_row()
    assert len(row) == len(SWEEP_HEADER)
    assert row[0] == "16"
    assert result.as_point().label == "16"


def test_a_client_that_measures_itself_says_so() -> None:
    busy = fold(ClosedLoop(1), [LoadRun([GOOD], 1.0, 0.97)], Objective())
    assert busy.client() == "97.0 %, it measures itself"
    assert fold(ClosedLoop(1), [LoadRun([GOOD], 1.0, 0.4)], Objective()).client() == "40.0 %"
