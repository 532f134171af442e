"""The dispatcher: who is taken, who waits, who is told what when engines come and go."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from backend.interface import (
    BackendSpec,
    Delta,
    Finish,
    Load,
    Overloaded,
    RequestRefused,
    SamplingParams,
    StepOutput,
    Submission,
)
from config import AdaptiveSettings, PoolSettings, QueueSettings
from engine.dispatcher import Dispatcher
from engine.live_request import LiveRequest
from engine.statistics import Statistics
from engine.waiting_room import LOOK_AHEAD
from ipc.messages import Cancel, FrontMessage, Step, Submit, encode

ROWS = 2
ROOM = ROWS + LOOK_AHEAD  # requests that an engine takes

SPEC = BackendSpec(
    name="scripted",
    model="none",
    folder=None,
    vocabulary=100,
    max_model_len=1000,
    stop_ids=(),
    page_tokens=16,
    pages=1000,
    max_running=ROWS,
    max_step_tokens=64,
    depth=1,
    device="cpu",
    dtype="none",
    attention="none",
)
NO_LOAD = Load(0, 0, 0, 0, 0, 0, 0, 0)


@dataclass
class House:
    """A dispatcher with engines that do what the test says."""

    dispatcher: Dispatcher
    sent: dict[int, list[FrontMessage]] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)  # ids, as they were notified

    def engine(self, index: int = 0) -> None:
        """An engine gets ready."""
        messages = self.sent[index] = []
        self.dispatcher.engine_ready(index, SPEC, messages.append)

    def request(self, id: str, owner: str = "", max_new_tokens: int = 8) -> LiveRequest:
        sampling = SamplingParams(max_new_tokens=max_new_tokens)
        submission = Submission(id, (1, 2, 3), sampling, seed=0)
        return LiveRequest(submission, id, owner, lambda live: self.news.append(live.id))

    def submit(self, *ids: str) -> list[LiveRequest]:
        requests = [self.request(id) for id in ids]
        for request in requests:
            self.dispatcher.submit([request])
        return requests

    def submitted(self, index: int = 0) -> list[str]:
        """Ids that an engine was given."""
        return [each.submission.id for each in self.sent[index] if isinstance(each, Submit)]

    def cancelled(self, index: int = 0) -> list[str]:
        return [each.id for each in self.sent[index] if isinstance(each, Cancel)]

    def step(self, *deltas: Delta, index: int = 0) -> None:
        self.dispatcher.step(index, Step.of(StepOutput(list(deltas)), NO_LOAD))

    def finish(self, *ids: str, index: int = 0) -> None:
        self.step(*(Delta(id, [5], Finish("length"), cached=0) for id in ids), index=index)


def house(max_queued: int = 0, engines: int = 1, **flags: Any) -> House:
    pool = PoolSettings.model_validate(flags)
    queue = QueueSettings(max_queued=max_queued)
    made = House(Dispatcher(pool, AdaptiveSettings(), queue, Statistics(10)))
    for index in range(engines):
        made.engine(index)
    return made


def names(count: int) -> list[str]:
    return [f"r{number}" for number in range(count)]


def test_requests_go_to_the_engine_until_it_has_rows_and_look_ahead_then_wait_in_order() -> None:
    it = house()
    it.submit(*names(ROOM + 3))
    assert it.submitted() == names(ROOM)
    assert (it.dispatcher.running, it.dispatcher.waiting) == (ROOM, 3)
    it.finish("r4", "r1")
    assert it.submitted() == names(ROOM + 2)


def test_tokens_and_the_finish_reach_the_request_once() -> None:
    it = house()
    (request,) = it.submit("a")
    it.step(Delta("a", [5, 6], cached=2))
    it.step(Delta("a", [7], Finish("stop", matched=7)))
    it.step(Delta("a", [8], Finish("length")))  # an engine that repeats itself changes nothing
    assert request.received == [5, 6, 7]
    assert request.cached == 2
    assert request.finish == Finish("stop", matched=7)
    assert it.news == ["a", "a"]
    assert it.dispatcher.running == 0


def test_beyond_the_bound_all_answers_of_a_request_are_refused_or_none() -> None:
    it = house(max_queued=2)
    it.submit(*names(ROOM + 1))
    with pytest.raises(Overloaded, match="MAX_QUEUED=2"):
        it.dispatcher.submit([it.request("x"), it.request("y")])
    assert it.dispatcher.waiting == 1
    it.dispatcher.submit([it.request("x")])
    assert it.dispatcher.waiting == 2


def test_a_burst_into_idle_engines_is_never_refused() -> None:
    it = house(max_queued=1, engines=2)
    it.dispatcher.submit([it.request(name) for name in names(2 * ROOM + 1)])
    assert it.dispatcher.waiting == 1


def test_a_name_in_use_is_refused_to_its_client_alone() -> None:
    it = house()
    it.submit("a")
    again = it.request("a")
    again.submission = replace(again.submission, id="another")
    with pytest.raises(RequestRefused, match="'a' is in use"):
        it.dispatcher.submit([it.request("b"), again])
    assert it.submitted() == ["a"]
    again.owner = "somebody else"
    it.dispatcher.submit([again])
    it.finish("a", "another")
    it.submit("a")
    assert it.submitted() == ["a", "another", "a"]


def test_one_that_cannot_be_sent_ends_with_an_error_and_hurts_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    it = house(max_inflight_total=1)
    first, bad, last = it.submit("first", "bad", "last")
    bad.submission = replace(bad.submission, prompt=(1 << 70,))
    it.dispatcher._room.remove("bad")
    it.dispatcher._room.push(bad.submission, 0.0)

    def send(message: FrontMessage) -> None:
        encode(message)
        it.sent[0].append(message)

    it.dispatcher._serving[0].send = send
    it.finish("first")
    it.finish("last")
    assert [each.finish and each.finish.reason for each in (first, bad, last)] == [
        "length",
        "error",
        "length",
    ]
    assert (it.dispatcher.running, it.dispatcher.waiting, it.dispatcher.is_idle) == (0, 0, True)
    assert "bad cannot be sent" in caplog.text


@pytest.mark.parametrize(
    ("flags", "running"),
    [({"max_inflight_total": 3}, 3), ({"max_inflight_per_engine": 2}, 4)],
)
def test_the_limits_bound_what_engines_get(flags: dict[str, int], running: int) -> None:
    it = house(engines=2, **flags)
    it.submit(*names(8))
    assert (it.dispatcher.running, it.dispatcher.waiting) == (running, 8 - running)


def test_a_limit_that_is_raised_lets_go_at_once() -> None:
    it = house(max_inflight_total=1)
    it.submit(*names(4))
    it.dispatcher.limits = replace(it.dispatcher.limits, max_inflight_total=3)
    assert it.submitted() == names(3)


def test_one_that_is_ended_while_it_waits_never_reaches_an_engine() -> None:
    it = house(max_inflight_total=1)
    _, waits = it.submit("runs", "waits")
    it.dispatcher.end(waits, Finish("abort"))
    it.finish("runs")
    assert it.submitted() == ["runs"]
    assert waits.finish == Finish("abort")


def test_one_that_is_ended_while_it_runs_keeps_its_row_until_the_engine_says_so() -> None:
    it = house(max_inflight_total=1)
    first, _ = it.submit("first", "second")
    it.step(Delta("first", [5]))
    it.dispatcher.end(first, Finish("stop", matched="x"))
    it.step(Delta("first", [6]))
    assert it.cancelled() == ["first"]
    assert it.submitted() == ["first"]
    it.step(Delta("first", finish=Finish("abort")))
    assert it.submitted() == ["first", "second"]
    assert first.received == [5]
    assert first.finish == Finish("stop", matched="x")
    assert it.news == ["first"]  # who ends it knows


def test_abort_finds_by_id_by_owner_and_all() -> None:
    it = house()
    requests = [it.request("a", "me"), it.request("b", "me"), it.request("c", "you")]
    for request in requests:
        it.dispatcher.submit([request])
    assert it.dispatcher.abort(request_id="a") == 1
    assert it.dispatcher.abort(request_id="a") == 0
    assert it.dispatcher.abort(owner="me") == 1
    assert it.dispatcher.abort() == 1
    assert it.news == ["a", "b", "c"]
    assert {request.finish and request.finish.reason for request in requests} == {"abort"}


def test_when_an_engine_dies_its_requests_end_with_one_error_and_the_rest_go_on() -> None:
    it = house(engines=2, max_inflight_per_engine=2)
    requests = it.submit(*names(6))
    lost = it.submitted(0)
    it.dispatcher.engine_lost(0, "killed (SIGKILL)")
    for request in requests:
        if request.id in lost:
            assert request.finish is not None
            assert request.finish.reason == "error"
            assert "SIGKILL" in str(request.finish.message)
        else:
            assert request.finish is None
    assert sorted(it.news) == sorted(lost)
    while running := [id for id in it.submitted(1) if id in it.dispatcher._live]:
        it.finish(*running, index=1)
    assert all(request.finish for request in requests)
    assert it.dispatcher.waiting == 0


def test_those_who_wait_for_engines_that_never_come_end_with_an_error() -> None:
    it = house(max_inflight_total=1)
    requests = it.submit(*names(3))
    it.dispatcher.engine_lost(0, "gone")
    it.dispatcher.end_waiting("every engine is down")
    assert [request.finish and request.finish.reason for request in requests] == ["error"] * 3
    assert (it.dispatcher.running, it.dispatcher.waiting) == (0, 0)


def adaptive(threshold: int) -> House:
    settings = AdaptiveSettings(enabled=True, threshold=threshold, factor=0.5)
    made = House(Dispatcher(PoolSettings(), settings, QueueSettings(), Statistics(10)))
    made.engine()
    return made


def test_answers_are_shortened_only_above_the_threshold_and_the_client_is_told() -> None:
    it = adaptive(threshold=2)
    asked = [it.request(name, max_new_tokens=9) for name in names(4)]
    warnings = [it.dispatcher.submit([request]) for request in asked]
    assert [request.submission.max_new_tokens for request in asked] == [9, 9, 9, 4]
    assert warnings[:3] == [[], [], []]
    (told,) = warnings[3]
    assert "from 9 to 4" in told


def test_a_shortened_answer_keeps_its_least_length() -> None:
    it = adaptive(threshold=1)
    it.submit("a", "b")
    request = it.request("c")
    sampling = SamplingParams(max_new_tokens=9, min_new_tokens=8)
    request.submission = replace(request.submission, sampling=sampling)
    it.dispatcher.submit([request])
    assert request.submission.max_new_tokens == 8


EVENTS = st.lists(
    st.sampled_from(("submit", "step", "end", "abort", "lose", "back", "limit")), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(
    events=EVENTS, mode=st.sampled_from(("rr", "fsfs", "random", "cache_aware")), seed=st.integers()
)
def test_whatever_happens_each_request_ends_exactly_once(
    events: Sequence[str], mode: str, seed: int
) -> None:
    draw = random.Random(seed)
    it = house(engines=2, max_queued=6, mode=mode)
    dispatcher, accepted, alive = it.dispatcher, dict[str, LiveRequest](), {0, 1}
    finishes: dict[str, int] = {}
    for number, event in enumerate(events):
        if event == "submit":
            many = [it.request(f"{number}-{index}") for index in range(draw.randint(1, 4))]
            try:
                dispatcher.submit(many)
                accepted |= {request.id: request for request in many}
            except Overloaded:
                pass
        elif event == "step" and alive:
            index = draw.choice(sorted(alive))
            running = list(dispatcher._serving[index].running)
            chosen = draw.sample(running, draw.randint(0, len(running)))
            it.step(
                *(Delta(id, [1], draw.choice((None, Finish("length")))) for id in chosen),
                index=index,
            )
        elif event == "end" and accepted:
            dispatcher.end(draw.choice(list(accepted.values())), Finish("abort"))
        elif event == "abort":
            dispatcher.abort(request_id=draw.choice([*accepted, "nobody"]))
        elif event == "lose" and alive:
            dispatcher.engine_lost(alive.pop(), "lost")
        elif event == "back" and len(alive) < 2:
            index = ({0, 1} - alive).pop()
            it.engine(index)
            alive.add(index)
        elif event == "limit":
            limits = replace(dispatcher.limits, max_inflight_total=draw.randint(0, 5))
            dispatcher.limits = limits
        for id, request in accepted.items():
            if request.finish is not None:
                finishes.setdefault(id, id_of(request.finish))
                assert finishes[id] == id_of(request.finish), "a finish was replaced"
        assert dispatcher.waiting <= 6
    for index in sorted(alive):
        dispatcher.engine_lost(index, "the end")
    dispatcher.end_waiting("the end")
    assert all(request.finish is not None for request in accepted.values())
    assert (dispatcher.running, dispatcher.waiting, len(dispatcher._live)) == (0, 0, 0)


def id_of(finish: Finish) -> int:
    return id(finish)
