"""Who waits, against a list that is sorted anew at each question."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings, strategies as st

from backend.interface import Overloaded, SamplingParams, Submission
from config import QueueSettings
from engine.waiting_room import WAIT_UNKNOWN_S, WaitingRoom

UNBOUNDED = QueueSettings(max_queued=0)


def ask(id: object, priority: int = 0, deadline: float | None = None) -> Submission:
    return Submission(str(id), (1,), SamplingParams(), seed=0, priority=priority, deadline=deadline)


def room_of(*submissions: Submission, bound: int = 0) -> WaitingRoom:
    room = WaitingRoom(QueueSettings(max_queued=bound))
    for submission in submissions:
        room.push(submission, 0.0)
    return room


def ids(submissions: Iterable[Submission]) -> list[str]:
    return [submission.id for submission in submissions]


def departures(room: WaitingRoom, *times: float, since: float = 0.0) -> None:
    """One submission leaves at each of `times`; they have waited since `since`, all together, and
    another waits behind them.
    """
    for time in times:
        room.push(ask(f"leaves at {time}"), since)
    room.push(ask("waits", priority=-1), since)
    for time in times:
        assert room.next(time) is not None


PUSHES = st.tuples(st.just("push"), st.integers(-2, 2), st.none() | st.integers(0, 20).map(float))
EVENTS = st.one_of(
    PUSHES,
    PUSHES,
    st.tuples(st.just("next")),
    st.tuples(st.just("remove"), st.integers(0, 30)),
    st.tuples(st.just("expire"), st.integers(0, 20)),
    st.tuples(st.just("clear")),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_the_order_is_that_of_a_list_sorted_anew(events: list[tuple[object, ...]]) -> None:
    room, model, count = WaitingRoom(UNBOUNDED), list[Submission](), 0
    for event in events:
        match event:
            case ("push", int() as priority, None | float() as deadline):
                submission = ask(count, priority, deadline)
                count += 1
                room.push(submission, 0.0)
                model.append(submission)
                model.sort(key=lambda each: -each.priority)  # stable: equals keep their order
            case ("next",):
                assert room.next(0.0) == (model.pop(0) if model else None)
            case ("remove", number):
                assert room.remove(str(number)) == (str(number) in ids(model))
                model = [each for each in model if each.id != str(number)]
            case ("expire", int() as now):
                late = [
                    each for each in model if each.deadline is not None and each.deadline <= now
                ]
                assert room.expire(now) == late
                model = [each for each in model if each not in late]
            case _:
                assert room.clear() == model
                model = []
        assert len(room) == len(model)
        assert [room.position(each.id) for each in model] == list(range(len(model)))


def test_whoever_does_not_wait_has_no_position() -> None:
    room = room_of(ask("gone"), ask("waits"))
    room.next(0.0)
    assert room.position("gone") is None
    assert room.position("never came") is None
    assert not room.remove("gone")
    assert room.position("waits") == 0


def test_a_full_room_refuses_with_its_depth_and_takes_again_when_one_has_left() -> None:
    room = room_of(ask("a"), ask("b"), bound=2)
    with pytest.raises(Overloaded, match="2 requests wait") as refused:
        room.check(1, 0, now=1.0)
    assert "MAX_QUEUED=2" in str(refused.value)
    assert refused.value.queue_depth == 2
    assert refused.value.retry_after_s > 0
    assert refused.value.est_wait_s > 0
    room.next(0.0)
    room.check(1, 0, now=1.0)


def test_the_bound_is_not_for_those_who_leave_at_once() -> None:
    room = room_of(ask("a"), ask("b"), bound=2)
    room.check(3, 3, now=1.0)
    with pytest.raises(Overloaded, match="0 requests wait"):
        room.check(4, 3, now=1.0)


def test_a_room_without_a_bound_takes_everybody() -> None:
    assert len(room_of(*map(ask, range(5000)))) == 5000


def test_the_expected_wait_is_that_of_the_last_departures() -> None:
    room = WaitingRoom(UNBOUNDED)
    departures(room, 10.5, 11.0, 11.5, 12.0, since=10.0)
    assert room.expected_wait(1, 12.0) == pytest.approx(0.5)
    assert room.expected_wait(6, 12.0) == pytest.approx(3.0)


def test_it_grows_while_nobody_leaves() -> None:
    room = WaitingRoom(UNBOUNDED)
    departures(room, 1.0, 2.0)
    assert room.expected_wait(1, 20.0) == pytest.approx(10.0)


def test_a_burst_says_how_long_it_took_to_come() -> None:
    room = WaitingRoom(UNBOUNDED)
    departures(room, *[80.0] * 8)  # eight rows end in one step
    assert room.expected_wait(4, 80.0) == pytest.approx(40.0)


def test_old_departures_are_forgotten() -> None:
    room = WaitingRoom(UNBOUNDED)
    slow, fast = range(1, 65), (64 + 0.25 * count for count in range(1, 65))
    departures(room, *map(float, slow), *fast)
    assert room.expected_wait(1, 80.0) == pytest.approx(0.25)


def test_those_who_are_served_at_once_say_nothing() -> None:
    room = WaitingRoom(UNBOUNDED)
    departures(room, 5.0, 5.0, since=5.0)
    assert room.expected_wait(1, 6.0) == WAIT_UNKNOWN_S


def test_a_quiet_night_does_not_make_the_wait_of_the_morning_long() -> None:
    room = WaitingRoom(UNBOUNDED)
    departures(room, 1.0, 2.0)
    assert room.next(3.0) is not None
    departures(room, 30_000.5, since=30_000.0)
    assert room.expected_wait(1, 30_000.5) == pytest.approx(0.5)


def test_those_who_leave_unserved_are_no_departures() -> None:
    room = room_of(ask("a"), ask("b", deadline=1.0), ask("c"))
    room.remove("a")
    room.expire(2.0)
    room.clear()
    assert room.expected_wait(1, 3.0) == WAIT_UNKNOWN_S
