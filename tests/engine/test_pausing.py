"""A pause: what waits is held in front, and an engine does no step until told to go on."""

from __future__ import annotations

import pytest

from ipc.messages import Cancel, Flush, Flushed, Pause, Paused, Step
from tests.engine.process_bench import PROMPT, greedy, submit
from tests.engine.test_dispatcher import house
from tests.engine.test_worker import AT_REST, serve


def test_what_comes_while_it_is_held_waits_and_goes_out_in_order_when_it_is_not() -> None:
    it = house()
    it.submit("a")
    it.dispatcher.hold()
    it.submit("b", "c")
    assert (it.submitted(), it.dispatcher.waiting) == (["a"], 2)
    it.finish("a")
    it.engine(1)
    assert (it.submitted(0), it.submitted(1)) == (["a"], [])
    it.dispatcher.release()
    assert (sorted(it.submitted(0) + it.submitted(1)), it.dispatcher.waiting) == (
        ["a", "b", "c"],
        0,
    )


def test_what_waits_while_it_is_held_can_be_ended() -> None:
    it = house()
    it.dispatcher.hold()
    (request,) = it.submit("a")
    assert it.dispatcher.abort() == 1
    assert request.finish is not None
    assert it.dispatcher.is_idle


def test_holding_and_releasing_may_be_said_twice() -> None:
    it = house()
    for _ in range(2):
        it.dispatcher.hold()
        assert it.dispatcher.held
    for _ in range(2):
        it.dispatcher.release()
        assert not it.dispatcher.held
    it.submit("a")
    assert it.submitted() == ["a"]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_paused_engine_does_no_step_and_then_goes_on_with_the_same_tokens(depth: int) -> None:
    front = serve(
        [submit("a", new=9)],
        *[[]] * 3,
        [Pause(0, True)],
        *[[]] * 5,
        [Flush(7)],
        [Pause(1, False)],
        depth=depth,
    )
    kinds = [type(message) for message in front.sent]
    paused, on = (index for index, kind in enumerate(kinds) if kind is Paused)
    assert kinds[paused + 1 : on] == [Flushed], "it listens, and does nothing else"
    assert Step in kinds[:paused]
    assert Step in kinds[on:]
    assert front.heard() == {"a": (greedy(PROMPT, 9), ["length"])}


def test_a_request_that_is_ended_during_a_pause_ends_when_it_goes_on() -> None:
    front = serve(
        [submit("a", new=9)], [], [Pause(0, True)], [Cancel("a")], [Pause(1, False)], AT_REST
    )
    assert front.heard()["a"][1] == ["abort"]
    load = front.steps[-1].load
    assert (load.running, load.pages_leased) == (0, 0)


def test_a_pause_may_be_said_twice_and_each_is_answered() -> None:
    front = serve([Pause(0, True)], [Pause(1, True)], [Pause(2, False)], [Pause(3, False)])
    assert [each.number for each in front.sent if isinstance(each, Paused)] == [0, 1, 2, 3]
