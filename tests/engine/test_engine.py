"""The loop: whoever was accepted ends exactly once, whatever fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from backend.interface import (
    BackendFailed,
    BackendSpec,
    DeviceLost,
    Overloaded,
    RequestRefused,
    Submission,
)
from engine.opening import open_backend
from engine.waiting_room import LOOK_AHEAD
from tests.engine.engine_bench import ABORT, LENGTH, ROWS, House, Scripted, fake_settings
from tests.engine.scheduler_bench import ask


@pytest.fixture(scope="module")
def spec() -> BackendSpec:
    return open_backend(fake_settings()).spec


@pytest.fixture
def scripted(spec: BackendSpec) -> Scripted:
    return Scripted(spec)


@pytest.fixture
def house() -> Iterator[House]:
    """An engine over the fake device. In the end all its pages are home."""
    house = House()
    yield house
    house.drain()
    house.engine.flush()
    load = house.engine.load()
    assert load.pages_free == load.pages_total
    house.engine.close()


class Clock:
    """`time.monotonic` of the engine, moved by hand."""

    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("engine.engine.time.monotonic", lambda: clock.now)
    return clock


def many(count: int, new: int = 4) -> list[Submission]:
    return [ask(str(index), (index + 1, 5, 6, 7, 8), new) for index in range(count)]


# Failures


@pytest.mark.parametrize("error", [DeviceLost("gone"), RuntimeError("broken"), KeyError("a bug")])
def test_when_a_step_fails_running_and_waiting_end_with_the_cause(
    scripted: Scripted, error: Exception
) -> None:
    house = House(scripted)
    house.submit(*many(20))
    house.step()
    scripted.fail_advance = error
    house.drain()
    assert list(house.reasons().values()) == ["length"] + ["error"] * 19
    assert house.engine.load().waiting == len(scripted.held) - ROWS, "nobody waits out here"
    messages = {finish.message for _, (finish,) in house.finishes.items()} - {None}
    assert len(messages) == 1
    (message,) = messages
    assert message is not None
    assert type(error).__name__ in message
    assert str(error) in message


def test_when_a_submission_breaks_the_backend_nobody_is_forgotten(scripted: Scripted) -> None:
    house = House(scripted)
    house.submit(*many(5))
    house.step()
    scripted.fail_submit = RuntimeError("no room")
    house.submit(ask("breaks it"), ask("waits behind it"))
    house.drain()
    assert list(house.reasons().values()) == ["length"] + ["error"] * 6


def test_after_a_failure_submissions_are_refused_with_the_cause(scripted: Scripted) -> None:
    house = House(scripted)
    house.submit(ask("a"))
    scripted.fail_advance = DeviceLost("the card fell off")
    house.drain()
    with pytest.raises(BackendFailed, match="DeviceLost: the card fell off"):
        house.engine.submit(ask("late"))
    assert house.engine.idle


def test_a_failed_backend_is_left_alone_even_if_it_would_go_on(scripted: Scripted) -> None:
    house = House(scripted)
    house.submit(*many(4))
    scripted.fail_advance = RuntimeError("once")
    house.drain()
    scripted.fail_advance, calls = None, scripted.calls
    assert scripted.held, "it would have answered"
    house.step()  # which sees that nobody ends twice
    assert scripted.calls == calls
    house.engine.close()
    assert scripted.calls == -1


def test_the_cause_is_one_line(scripted: Scripted) -> None:
    house = House(scripted)
    house.submit(ask("a"))
    scripted.fail_advance = RuntimeError("CUDA error:\n  out of memory\n\n  hint: set X\n")
    house.drain()
    message = house.finishes["a"][0].message
    assert message is not None
    assert message.endswith("CUDA error: out of memory hint: set X")


@pytest.mark.parametrize(("error", "traced"), [(RuntimeError("bug"), True), (DeviceLost(), False)])
def test_a_failure_is_logged_once_with_its_trace_where_it_is_a_defect(
    scripted: Scripted, caplog: pytest.LogCaptureFixture, error: Exception, traced: bool
) -> None:
    house = House(scripted)
    house.submit(ask("a"))
    scripted.fail_advance = error
    house.drain()
    house.step()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert bool(record.exc_info) == traced


def test_an_abort_in_the_step_that_fails_stays_an_abort(scripted: Scripted) -> None:
    house = House(scripted)
    house.submit(*many(3), ask("late", new=1))
    house.engine.cancel("late")
    scripted.fail_advance = RuntimeError("broken")
    house.drain()
    assert house.reasons()["late"] == "abort"


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("step", [1, 2, 5, 9])
def test_a_lost_device_ends_every_answer_once(step: int, depth: int) -> None:
    house = House(fail_at_step=step, depth=depth)
    house.submit(*many(20))
    house.drain()
    assert "error" in house.reasons().values()
    right = House()
    right.submit(*many(20))
    right.drain()
    for id, tokens in house.tokens.items():  # what was heard was right
        assert tokens == right.tokens[id][: len(tokens)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["submit", "cancel", "late", "step", "step"]), min_size=1, max_size=30
    ),
    st.sampled_from([0, 2, 6]),
    st.integers(0, 12),
    st.sampled_from([1, 2]),
)
def test_every_accepted_submission_ends_exactly_once(
    events: Sequence[str], max_queued: int, fail_at_step: int, depth: int
) -> None:
    house = House(max_queued=max_queued, fail_at_step=fail_at_step, depth=depth)
    for number, event in enumerate(events):
        submission = ask(str(number), (number + 1, 2, 3), 1 + number % 4)
        if event == "step":
            house.step()
        elif event == "cancel":
            house.engine.cancel(str(number // 2))
        else:
            deadline = -1.0 if event == "late" else None
            with suppress(Overloaded, BackendFailed):
                house.submit(replace(submission, deadline=deadline))
    house.drain()


# Refusals


def test_an_id_in_use_is_refused_and_its_owner_goes_on(house: House) -> None:
    house.submit(ask("twin", new=5))
    for _ in range(3):  # while the first waits, and while it runs
        with pytest.raises(RequestRefused, match="'twin'") as refused:
            house.engine.submit(ask("twin", (9, 9)))
        assert refused.value.param == "id"
        house.step()
    house.drain()
    assert len(house.tokens["twin"]) == 5


def test_an_id_is_free_again_when_its_answer_has_ended(house: House) -> None:
    for _ in range(2):
        house.submit(ask("again"))
        house.drain()


@pytest.mark.parametrize("wrong", [ask("a", ()), ask("a", (1, 10**6)), ask("a", (1,) * 300)])
def test_a_refused_submission_leaves_nothing(house: House, wrong: Submission) -> None:
    with pytest.raises(RequestRefused):
        house.engine.submit(wrong)
    assert house.engine.idle
    assert house.engine.load().waiting == 0
    house.submit(ask("a"))  # its id is free


def fill(house: House) -> Overloaded:
    """Submit until no more are taken. What the last one is told."""
    for number in range(1000):
        try:
            house.submit(ask(f"{len(house.finishes)} {number}"))
        except Overloaded as refused:
            return refused
    raise AssertionError("there is no bound")


def test_beyond_the_bound_submissions_are_refused_with_an_honest_answer(
    scripted: Scripted, clock: Clock
) -> None:
    house = House(scripted, max_queued=4)
    for _ in range(100):  # the backend ends one every two seconds
        refused = fill(house)
        assert refused.queue_depth == 4
        clock.now += 2
        house.step()
    assert refused.retry_after_s == pytest.approx(2)
    assert refused.est_wait_s == pytest.approx(4 * 2)
    house.drain()


def test_a_burst_is_not_refused_while_the_backend_has_rows(scripted: Scripted) -> None:
    house = House(scripted, max_queued=1)
    burst = [ask(f"{number}") for number in range(scripted.spec.max_running + LOOK_AHEAD + 1)]
    house.submit(*burst)
    with pytest.raises(Overloaded, match="1 requests wait"):
        house.engine.submit(ask("b"))


def test_who_was_refused_may_come_again(scripted: Scripted) -> None:
    house = House(scripted, max_queued=1)
    assert "MAX_QUEUED=1" in str(fill(house))
    house.drain()
    house.submit(ask("b"))
    house.drain()
    assert house.reasons()["b"] == "length"


# Cancelling


def test_a_cancel_while_waiting_keeps_it_from_the_backend(scripted: Scripted) -> None:
    house = House(scripted)
    house.submit(ask("a"), ask("gone"))
    house.engine.cancel("gone")
    house.engine.cancel("gone")
    assert house.engine.load().waiting == 1
    house.drain()
    assert house.finishes == {"a": [LENGTH], "gone": [ABORT]}
    assert scripted.began == ["a"]


def test_an_end_decided_here_does_not_wait_for_the_backend(scripted: Scripted) -> None:
    house = House(scripted)
    house.step(wait=5.0)
    house.submit(ask("gone"))
    house.engine.cancel("gone")
    house.step(wait=5.0)
    assert scripted.waits == [5.0, 0.0]
    assert house.finishes["gone"] == [ABORT]


def test_a_cancel_while_running_ends_one_and_leaves_the_others(house: House) -> None:
    house.submit(*many(3, new=8))
    house.step()
    house.step()
    house.engine.cancel("1")
    house.engine.cancel("1")
    house.drain()
    assert house.reasons() == {"0": "length", "1": "abort", "2": "length"}
    assert 0 < len(house.tokens["1"]) < 8


def test_cancelling_the_ended_and_the_unknown_changes_nothing(house: House) -> None:
    house.submit(ask("a"))
    house.engine.cancel("nobody")
    house.drain()
    house.engine.cancel("a")
    house.step()
    assert house.finishes == {"a": [LENGTH]}


# Deadlines


def test_who_still_waits_at_the_deadline_is_given_up(scripted: Scripted, clock: Clock) -> None:
    house = House(scripted)
    house.submit(*many(ROWS + LOOK_AHEAD + 3))
    house.submit(replace(ask("late"), deadline=clock.now + 5, priority=-1))
    house.submit(replace(ask("patient"), deadline=clock.now + 500, priority=-1))
    house.step()
    assert not house.finishes["late"]
    clock.now += 5
    house.step()
    (finish,) = house.finishes["late"]
    assert finish.reason == "abort"
    assert "deadline" in (finish.message or "")
    house.drain()
    assert house.reasons()["patient"] == "length"


def test_a_deadline_gives_up_nobody_who_runs(house: House, clock: Clock) -> None:
    house.submit(replace(ask("a", new=6), deadline=clock.now + 1))
    house.step()
    clock.now += 10
    house.drain()
    assert house.finishes["a"] == [LENGTH]


def test_a_deadline_that_has_passed_on_arrival_computes_nothing(house: House) -> None:
    house.submit(replace(ask("a"), deadline=-1.0))
    house.step()
    assert house.reasons() == {"a": "abort"}
    assert house.engine.load().steps == 0


# Order


def test_the_urgent_go_first_and_equals_in_the_order_they_came(scripted: Scripted) -> None:
    house = House(scripted)
    priorities = [0, 5, 0, -1, 5, 9]
    house.submit(
        *(replace(ask(str(at)), priority=priority) for at, priority in enumerate(priorities))
    )
    house.drain()
    assert scripted.began == ["5", "1", "4", "0", "2", "3"]


@pytest.mark.parametrize("pace", [1, 2, ROWS])
def test_a_backend_never_holds_more_than_its_rows_and_the_look_ahead(
    scripted: Scripted, pace: int
) -> None:
    scripted.pace = pace
    house = House(scripted)
    house.submit(*many(40))
    house.drain()
    assert scripted.most_held == ROWS + LOOK_AHEAD
    assert scripted.began == [str(index) for index in range(40)]


# What it says of itself


def test_the_load_counts_those_who_wait_in_either_room(house: House) -> None:
    house.submit(*many(20))
    assert house.engine.load().waiting == 20
    house.step()
    load = house.engine.load()
    assert (load.running, load.waiting) == (ROWS, 20 - ROWS)
    assert house.engine.load().pages_leased > 0


def test_idle_is_said_when_every_finish_has_gone_out(house: House) -> None:
    assert house.engine.idle
    house.submit(ask("a"), ask("gone"))
    house.engine.cancel("gone")
    assert not house.engine.idle
    while not (house.finishes["a"] and house.finishes["gone"]):
        assert not house.engine.idle
        house.step()
    assert house.engine.idle


def test_warming_up_leaves_no_trace_and_flushing_gives_pages_back(house: House) -> None:
    assert house.engine.warm(4) == 4
    assert house.engine.idle
    house.engine.flush()
    house.submit(ask("a", range(8), 5))
    house.drain()
    assert house.engine.load().pages_cached == 3
    assert house.engine.flush() == 3
    assert house.engine.load().pages_cached == 0
