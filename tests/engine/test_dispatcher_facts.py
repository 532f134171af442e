"""What the dispatcher knows of a request besides its tokens: place, prompt, work, vector."""

from __future__ import annotations

import asyncio

from backend.interface import Delta, Finish, Work
from engine.cache_history import Question
from tests.engine.test_dispatcher import ROOM, house


def test_whoever_waits_has_a_place_and_whoever_is_served_has_none() -> None:
    it = house()
    requests = it.submit(*(str(number) for number in range(ROOM + 3)))
    places = [it.dispatcher.place_of(request) for request in requests]
    assert places[:ROOM] == [None] * ROOM
    assert [place and place[0] for place in places[ROOM:]] == [1, 2, 3]
    it.finish("0")
    assert it.dispatcher.place_of(requests[ROOM]) is None
    after = it.dispatcher.place_of(requests[ROOM + 1])
    assert after is not None
    assert after[0] == 1
    assert after[1] > 0


def test_news_of_a_prompt_wake_nobody_and_work_comes_with_the_finish() -> None:
    it = house()
    (request,) = it.submit("a")
    it.step(Delta("a", prefilled=2))
    assert (request.prefilled, it.news) == (2, [])
    work = Work(1, 1, 0, 3)
    it.step(Delta("a", finish=Finish("length"), cached=0, pooled=[0.5], work=work))
    assert (request.work, list(request.pooled), it.news) == (work, [0.5], ["a"])


def test_only_prompts_that_were_computed_are_remembered() -> None:
    it = house()
    it.submit("done", "cut")
    it.step(Delta("cut", finish=Finish("abort"), cached=0))

    def recent() -> int:
        question = Question("", "", (1, 2, 3), 1, now=0.0)
        (found,) = asyncio.run(it.dispatcher.history.explain(question, [0]))
        return found.hit

    assert recent() == 0
    it.step(Delta("done", [5], cached=0))
    assert recent() == 2
    it.dispatcher.engine_lost(0, "out of luck")
    assert recent() == 0
