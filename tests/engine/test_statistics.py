"""The numbers, against scripted histories and sums over plain lists. No clock runs here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from backend.interface import Finish, FinishReason, Load, SamplingParams, StepOutput, Submission
from engine.live_request import LiveRequest
from engine.statistics import AVERAGES, RATE_SPAN_S, SECONDS, STEP_TOKENS, Distribution, Statistics
from ipc.messages import Step

TIMES = st.floats(0, 1000)


class Clock:
    """What time it is, as the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(arrival: float = 0.0, prompt: int = 3) -> LiveRequest:
    submission = Submission("a", (1,) * prompt, SamplingParams(), seed=0, arrival=arrival)
    return LiveRequest(submission, "a", "", lambda request: None)


def place(statistics: Statistics, request: LiveRequest, at: float) -> None:
    request.placed = at
    statistics.placed(request)


def receive(statistics: Statistics, request: LiveRequest, count: int, at: float) -> None:
    """As the pool does it: the statistics first."""
    statistics.received(request, count, at)
    request.received += [1] * count
    request.first_token = at if request.first_token is None else request.first_token
    request.last_token = at


def finish(
    statistics: Statistics, request: LiveRequest, at: float, reason: FinishReason = "stop"
) -> None:
    request.finish, request.ended = Finish(reason), at
    statistics.finished(request)


def answer(
    statistics: Statistics,
    arrival: float,
    tokens_at: Sequence[float],
    reason: FinishReason = "stop",
) -> LiveRequest:
    """A request that is placed 0.1 s after its arrival, and ends with its last token."""
    request = ask(arrival)
    statistics.accepted(request)
    place(statistics, request, arrival + 0.1)
    for at in tokens_at:
        receive(statistics, request, 1, at)
    finish(statistics, request, tokens_at[-1], reason)
    return request


def step(preemptions: int = 0, tokens: int = 0, seconds: float = 0.0) -> Step:
    load = Load(0, 0, 10, 10, 0, 0, preemptions, 0)
    return Step.of(StepOutput(step_tokens=tokens, step_seconds=seconds), load)


@given(st.lists(TIMES, min_size=1), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_between_the_bounds_of_the_value_that_a_list_has_there(
    values: list[float], share: float
) -> None:
    distribution = Distribution(SECONDS)
    for value in values:
        distribution.add(value)
    exact = sorted(values)[math.ceil(share * len(values)) - 1]
    above = next((bound for bound in SECONDS if exact <= bound), SECONDS[-1])
    below = max((bound for bound in SECONDS if bound < min(exact, SECONDS[-1])), default=0.0)
    found = distribution.quantile(share)
    assert found is not None
    assert below <= found <= above


def test_a_quantile_divides_the_bucket_that_it_falls_into() -> None:
    distribution = Distribution((1.0, 2.0, 4.0))
    assert distribution.quantile(0.5) is None
    distribution.add(3.0, 4)
    assert distribution.quantile(0.25) == pytest.approx(2.5)
    assert distribution.quantile(1.0) == pytest.approx(4.0)
    distribution.add(100.0, 96)
    assert distribution.quantile(0.5) == pytest.approx(4.0)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5))),
    st.sets(st.integers(0, 10)).map(sorted),
)
def test_a_distribution_counts_what_a_list_holds(
    values: list[tuple[int, int]], bounds: list[int]
) -> None:
    distribution, model = Distribution(bounds), list[int]()
    for value, times in values:
        distribution.add(value, times)
        model += [value] * times
    assert distribution.count == len(model)
    assert distribution.sum == sum(model)
    assert distribution.cumulative() == [
        sum(value <= bound for value in model) for bound in [*bounds, math.inf]
    ]


@pytest.mark.parametrize("bounds", [SECONDS, STEP_TOKENS])
def test_bounds_ascend(bounds: Sequence[float]) -> None:
    assert list(bounds) == sorted(set(bounds))


def test_the_first_token_is_timed_from_the_arrival_and_the_others_from_the_one_before() -> None:
    statistics, request = Statistics(1), ask(arrival=10.0)
    receive(statistics, request, 1, at=10.5)
    assert statistics.time_to_first_token.sum == pytest.approx(0.5)
    assert statistics.inter_token.count == 0
    receive(statistics, request, 1, at=10.75)
    assert statistics.time_to_first_token.count == 1
    assert statistics.inter_token.sum == pytest.approx(0.25)
    assert statistics.generated_tokens == 2


def test_tokens_that_come_together_share_the_time_since_the_one_before() -> None:
    statistics, request = Statistics(1), ask()
    receive(statistics, request, 1, at=1.0)
    receive(statistics, request, 4, at=2.0)
    assert statistics.inter_token.count == 4
    assert statistics.inter_token.sum == pytest.approx(1.0)
    alone = Distribution(SECONDS)
    alone.add(0.25, 4)
    assert statistics.inter_token.counts == alone.counts


def test_a_finish_without_a_token_is_no_token() -> None:
    statistics, request = Statistics(1), ask()
    statistics.received(request, 0, 1.0)
    assert statistics.generated_tokens == statistics.time_to_first_token.count == 0


def test_each_average_says_what_the_client_saw() -> None:
    statistics = Statistics(10)
    answer(statistics, arrival=0.0, tokens_at=[0.5, 0.6, 0.9])
    assert statistics.averages() == {
        "ttft_ms": pytest.approx(500),
        "itl_ms": pytest.approx(200),
        "e2e_ms": pytest.approx(900),
        "queue_ms": pytest.approx(100),
        "output_tokens": 3,
        "request_tokens_per_s": pytest.approx(3 / 0.9),
        "output_tokens_per_s": 0.0,  # the process has run for longer than it remembers
    }


def test_before_the_first_answer_there_is_no_average() -> None:
    averages = Statistics(10).averages()
    assert averages == {**dict.fromkeys(AVERAGES), "output_tokens_per_s": 0.0}


def test_an_answer_of_no_or_one_token_has_no_time_between_tokens() -> None:
    statistics, empty = Statistics(10), ask()
    place(statistics, empty, at=0.5)
    finish(statistics, empty, at=1.0, reason="length")
    averages = statistics.averages()
    assert averages["ttft_ms"] is averages["itl_ms"] is None
    assert averages["e2e_ms"] == pytest.approx(1000)
    answer(statistics, 0.0, [0.3])
    averages = statistics.averages()
    assert averages["ttft_ms"] == pytest.approx(300)
    assert averages["itl_ms"] is None
    assert averages["output_tokens"] == pytest.approx(0.5)


def test_an_answer_that_ends_as_it_arrives_has_no_speed() -> None:
    statistics, request = Statistics(10), ask(arrival=1.0)
    finish(statistics, request, at=1.0)
    assert statistics.averages()["request_tokens_per_s"] is None


@given(st.lists(TIMES, max_size=20), st.integers(1, 8))
def test_an_average_rolls_over_the_last_answers(lengths: list[float], window: int) -> None:
    statistics = Statistics(window)
    for length in lengths:
        finish(statistics, ask(), at=length)
    last = lengths[-window:]
    expected = pytest.approx(1e3 * sum(last) / len(last)) if last else None
    assert statistics.averages()["e2e_ms"] == expected


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_was_cut_off_changes_no_average(reason: FinishReason) -> None:
    statistics = Statistics(10)
    answer(statistics, 0.0, [0.5, 0.6])
    before, latency = statistics.averages(), statistics.end_to_end.cumulative()
    answer(statistics, 0.0, [500.0, 900.0], reason)
    finish(statistics, ask(), at=1000.0, reason=reason)  # while it waited
    assert statistics.averages() == before
    assert statistics.end_to_end.cumulative() == latency
    assert statistics.requests[reason] == 2
    assert statistics.generated_tokens == 4  # but what was generated was generated


def test_prompts_count_where_an_engine_had_them_and_cached_tokens_with_them() -> None:
    statistics, placed, waited = Statistics(1), ask(prompt=100), ask(prompt=7)
    place(statistics, placed, at=1.0)
    placed.cached = 64
    finish(statistics, placed, at=2.0)
    finish(statistics, waited, at=2.0, reason="abort")
    assert (statistics.prompt_tokens, statistics.cached_tokens) == (100, 64)
    assert statistics.queue_time.count == 1
    assert statistics.queue_time.sum == pytest.approx(1.0)


def test_every_finish_reason_stands_there_from_the_start() -> None:
    assert Statistics(1).requests == {"stop": 0, "length": 0, "abort": 0, "error": 0}


@given(st.lists(st.tuples(st.floats(0.001, 3), st.integers(1, 9)), max_size=80), st.floats(0, 15))
def test_tokens_a_second_are_those_of_the_last_span(
    arrivals: list[tuple[float, int]], idle: float
) -> None:
    clock = Clock()
    statistics, request, model = Statistics(1, clock), ask(), list[tuple[float, int]]()
    for pause, count in arrivals:
        clock.now += pause
        receive(statistics, request, count, clock.now)
        model.append((clock.now, count))
    clock.now += idle
    start = clock.now - RATE_SPAN_S
    tokens = statistics.output_tokens_per_s * RATE_SPAN_S
    most = sum(count for when, count in model if when >= start)
    least = sum(count for when, count in model if when >= start + 0.1)  # a slice is not divided
    assert least - 1e-6 <= tokens <= most + 1e-6


def test_a_step_is_counted_and_what_was_decided_between_steps_is_not() -> None:
    statistics = Statistics(1)
    statistics.step(0, step(tokens=64, seconds=0.01))
    statistics.step(0, step())
    assert statistics.step_tokens.count == statistics.step_seconds.count == 1
    assert statistics.step_tokens.sum == 64
    assert statistics.step_seconds.sum == pytest.approx(0.01)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 2), st.integers(0, 3)),
        st.tuples(st.just("restart"), st.integers(0, 2), st.just(0)),
    )
)


@given(EVENTS)
def test_preemptions_add_up_over_replicas_and_their_restarts(
    events: list[tuple[str, int, int]],
) -> None:
    statistics, engines, total = Statistics(1), [0, 0, 0], 0
    for kind, replica, more in events:
        if kind == "step":
            total += more
            engines[replica] += more  # an engine says how many it has had
            statistics.step(replica, step(preemptions=engines[replica]))
        else:
            engines[replica] = 0
            statistics.restarted(replica)
        assert statistics.preemptions == total
    assert statistics.restarts == sum(kind == "restart" for kind, _, _ in events)


def test_a_phase_is_that_of_the_last_start() -> None:
    statistics = Statistics(1)
    statistics.phase(0, "load weights", 5.0)
    statistics.phase(1, "load weights", 6.0)
    statistics.restarted(0)
    statistics.phase(0, "load weights", 2.0)
    assert statistics.phases == {0: {"load weights": 2.0}, 1: {"load weights": 6.0}}


def test_a_snapshot_is_json_and_stays_as_it_was() -> None:
    statistics = Statistics(10)
    answer(statistics, 0.0, [0.5, 0.6])
    statistics.rejected("queue_full")
    statistics.phase(0, "load", 1.5)
    snapshot = statistics.snapshot()
    written = json.dumps(snapshot)
    answer(statistics, 0.0, [0.7])
    statistics.rejected("draining")
    statistics.phase(0, "warm", 0.5)
    assert json.dumps(snapshot) == written
    assert json.loads(written) == {
        "requests_accepted_total": 1,
        "requests_total": {"stop": 1, "length": 0, "abort": 0, "error": 0},
        "rejected_total": {"queue_full": 1},
        "prompt_tokens_total": 3,
        "cached_tokens_total": 0,
        "generated_tokens_total": 2,
        "preemptions_total": 0,
        "engine_restarts_total": 0,
        "startup_phase_seconds": {"0": {"load": 1.5}},
        "averages": snapshot["averages"],
    }
