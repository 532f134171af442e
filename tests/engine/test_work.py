"""What an answer took of its engine, and how far its prompt is: held against the plans."""

from __future__ import annotations

from collections import Counter

import pytest

from backend.interface import Delta, Submission, Wants, Work
from tests.engine.scheduler_bench import Bench, ask


def run(bench: Bench, *submissions: Submission) -> list[Delta]:
    """All deltas, in order."""
    deltas: list[Delta] = []
    for submission in submissions:
        bench.backend.submit(submission)
    while not bench.idle:
        deltas += bench.backend.advance(0).deltas
    return deltas


def counted(bench: Bench, submission: Submission) -> Work:
    """The same from the plans, which no step of was dropped."""
    owners: dict[int, int] = {}
    steps, rows, computed = Counter[int](), Counter[int](), Counter[int]()
    for plan in bench.recorder.plans:
        owners.update({setup.slot: setup.seed for setup in plan.taken})
        for chunk in plan.chunks:
            owner = owners[chunk.slot]
            steps[owner] += 1
            rows[owner] += len(plan.chunks)
            computed[owner] += 0 if chunk.tokens is None else chunk.count
    seed = submission.seed
    yields = len(bench.recorder.starts[seed]) - 1
    return Work(steps[seed], rows[seed], yields, computed[seed])


@pytest.mark.parametrize("max_step_tokens", [4, 16])
@pytest.mark.parametrize("prefix", [True, False])
def test_work_is_counted_as_the_steps_were_planned(
    monkeypatch: pytest.MonkeyPatch, max_step_tokens: int, prefix: bool
) -> None:
    monkeypatch.setattr("engine.scheduler.HEADROOM_TOKENS", 0)  # so that some have to yield
    bench = Bench(
        pages=20, page_tokens=1, max_running=3, max_step_tokens=max_step_tokens, prefix=prefix
    )
    asked = [ask("a", range(7), 9), ask("b", range(9), 4), ask("c", (5,), 14), ask("d", (6, 7), 0)]
    work = {delta.id: delta.work for delta in run(bench, *asked) if delta.finish}
    assert work == {each.id: counted(bench, each) for each in asked}
    assert sum(each.yields for each in work.values() if each) == bench.backend.load().preemptions
    assert bench.backend.load().preemptions > 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_that_came_too_late_for_an_answer_are_not_its_own(depth: int) -> None:
    bench = Bench(depth=depth)
    (work,) = [delta.work for delta in run(bench, ask("a", new=6)) if delta.finish]
    assert work == Work(steps=6, rows=6, yields=0, computed=6)


def test_an_answer_that_was_cancelled_says_what_it_took_until_then() -> None:
    bench = Bench(max_step_tokens=4)
    bench.backend.submit(ask("a", range(10), 6))
    bench.backend.submit(ask("b", range(10), 6))
    bench.backend.advance(0)
    bench.backend.advance(0)
    bench.backend.cancel("a")
    bench.backend.cancel("b")
    work = {delta.id: delta.work for delta in bench.backend.advance(0).deltas}
    assert work == {"a": Work(2, 2, 0, 8), "b": Work(0, 0, 0, 0)}


def test_only_who_asks_hears_of_a_prompt_that_goes_on() -> None:
    bench = Bench(max_step_tokens=4)
    asks = ask("asks", range(15), 2, wants=Wants(progress=True))
    deltas = run(bench, asks, ask("does not", range(20, 35), 2))
    told = [(delta.id, delta.prefilled) for delta in deltas if delta.prefilled is not None]
    assert told == [("asks", 4), ("asks", 8), ("asks", 12)]
    assert all(not (delta.tokens or delta.finish) for delta in deltas if delta.prefilled)
