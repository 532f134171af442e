"""Sequences with a grammar in the scheduler: they wait for it alone, and bind nobody else."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

import backend.grammar
from backend.grammar import Compiled, compile_grammar
from backend.interface import Finish, Grammar, Submission
from tests.conformance.driver import Answer
from tests.engine.scheduler_bench import Bench, ask

PATTERN = "(na|ne){4}!"
TEXT = re.compile(PATTERN)


def bound(
    id: str,
    prompt: Sequence[int] = (1, 2, 3, 4, 5, 6),
    *,
    pattern: str = PATTERN,
    new: int = 20,
    **more: Any,
) -> Submission:
    plain = ask(id, prompt, new, **more)
    return replace(plain, sampling=replace(plain.sampling, grammar=Grammar("regex", pattern)))


def text(answer: Answer) -> str:
    return bytes(answer.tokens).decode()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is compiled before it is set."""
    event = threading.Event()

    def slow(*given: Any) -> Compiled:
        assert event.wait(10)
        return compile_grammar(*given)

    monkeypatch.setattr(backend.grammar, "compile_grammar", slow)
    return event


def compiled(bench: Bench, submission: Submission) -> Future[Compiled]:
    grammar = submission.sampling.grammar
    assert grammar is not None
    found: Future[Compiled] = bench.backend._constraints._grammars.compile(grammar)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bound_and_free_rows_share_steps_and_the_free_ones_answer_as_alone(depth: int) -> None:
    free = [ask(f"free {number}", range(1, number + 2), 12) for number in range(3)]
    alone = [Bench(depth=depth).run(each)[0].tokens for each in free]
    bench = Bench(depth=depth, max_running=6)
    compiled(bench, bound("b")).result(10)
    found = bench.run(*free, *(bound(f"bound {number}") for number in range(3)))
    assert [answer.tokens for answer in found[:3]] == alone
    for answer in found[3:]:
        assert TEXT.fullmatch(text(answer))
        assert answer.finishes == [Finish("stop")]
    plans = bench.recorder.plans
    assert any(0 < len(plan.masked) < len(plan.chunks) for plan in plans)
    for plan in plans:
        assert all(plan.chunks[index].samples for index in plan.masked)


def test_who_waits_for_a_grammar_holds_up_nobody_behind(gate: threading.Event) -> None:
    bench = Bench()
    bench.submit(bound("bound"))
    bench.submit(ask("free"))
    while not bench.answers["free"].finishes:
        bench.advance()
    assert not bench.answers["bound"].cached
    gate.set()
    bench.drain()
    assert TEXT.fullmatch(text(bench.answers["bound"]))


def test_while_only_a_grammar_is_waited_for_the_scheduler_rests(gate: threading.Event) -> None:
    bench = Bench()
    bench.submit(bound("bound"))
    threading.Timer(0.2, gate.set).start()
    rounds = 0
    while bench.answers["bound"].cached == []:
        bench.advance()
        rounds += 1
    assert rounds < 100  # each of them waits for 10 ms: a loop that spins makes thousands
    bench.drain()


def test_who_leaves_while_a_grammar_is_compiled_is_gone(gate: threading.Event) -> None:
    bench = Bench()
    bench.submit(bound("bound"))
    bench.advance()
    bench.backend.cancel("bound")
    bench.advance()
    assert bench.answers["bound"].finishes == [Finish("abort")]
    gate.set()
    bench.run(ask("next"))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_grammar_that_cannot_be_compiled_is_one_clean_error(depth: int) -> None:
    bench = Bench(depth=depth)
    broken, good, free = bench.run(bound("broken", pattern="a("), bound("good"), ask("free"))
    (finish,) = broken.finishes
    assert finish.reason == "error"
    assert "unclosed group" in str(finish.message)
    assert (broken.tokens, good.finishes) == ([], [Finish("stop")])
    assert free.finishes == [Finish("length")]


class ParserPanic(BaseException):
    """As Rust's panics come to Python: no Exception."""


def test_a_defect_of_the_compiler_ends_one_answer_and_no_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*given: Any) -> Compiled:
        raise ParserPanic

    monkeypatch.setattr(backend.grammar, "compile_grammar", broken)
    bench = Bench()
    failed, free = bench.run(bound("bound"), ask("free"))
    assert [finish.reason for finish in failed.finishes] == ["error"]
    assert free.finishes == [Finish("length")]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_bound_sequence_that_yields_comes_back_to_where_its_grammar_was(depth: int) -> None:
    asked = [
        bound(f"{number}", range(number, number + 6), pattern="(na|ne){9}!") for number in range(4)
    ]
    expected = [Bench(depth=depth).run(each)[0].tokens for each in asked]
    bench = Bench(depth=depth, pages=18, page_tokens=2)  # room for one whole answer, and a little
    compiled(bench, asked[0]).result(10)
    found = bench.run(*asked)
    assert bench.backend.load().preemptions
    assert [answer.tokens for answer in found] == expected


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_a_resumed_answer_goes_on_within_its_grammar(count: int) -> None:
    (whole,) = Bench().run(bound("a"))
    received = tuple(whole.tokens[:count])
    (rest,) = Bench().run(bound("a", received=received))
    assert [*received, *rest.tokens][: len(whole.tokens)] == whole.tokens
    assert [finish.reason for finish in rest.finishes] == ["stop"]


def test_an_answer_resumed_off_its_grammar_is_an_error() -> None:
    (answer,) = Bench().run(bound("a", received=(1, 2)))
    assert [finish.reason for finish in answer.finishes] == ["error"]


def test_n_answers_of_one_prompt_share_its_pages_and_each_follows_its_own_state() -> None:
    bench = Bench(max_running=4)
    found = bench.run(*(bound(f"n{number}", range(20), group="g") for number in range(3)))
    assert all(TEXT.fullmatch(text(answer)) for answer in found)
    assert [answer.cached[0] for answer in found[1:]] == [16, 16]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_bound_sequence_may_be_cancelled_at_any_step(depth: int, after: int) -> None:
    bench = Bench(depth=depth)
    compiled(bench, bound("b")).result(10)
    bench.submit(bound("a"))
    bench.submit(ask("free", new=10))
    for _ in range(after):
        bench.advance()
    bench.backend.cancel("a")
    bench.drain()
    assert bench.answers["a"].finishes == [Finish("abort")]
    assert bench.answers["free"].finishes == [Finish("length")]


def end_ignored(submission: Submission) -> Submission:
    return replace(submission, sampling=replace(submission.sampling, ignore_eos=True))


def least(submission: Submission) -> Submission:
    return replace(submission, sampling=replace(submission.sampling, min_new_tokens=15))


@pytest.mark.parametrize("changed", [end_ignored, least])
def test_a_complete_answer_ends_whatever_the_request_says_of_ends(
    changed: Callable[[Submission], Submission],
) -> None:
    (answer,) = Bench().run(changed(bound("a")))
    assert TEXT.fullmatch(text(answer))
    assert answer.finishes == [Finish("stop")]


def test_an_answer_that_is_complete_at_its_length_is_no_cut_one() -> None:
    whole = bound("a", new=9)
    (answer,) = Bench().run(whole)
    assert answer.finishes == [Finish("stop")]
    (cut,) = Bench().run(bound("a", new=8))
    assert cut.finishes == [Finish("length")]


def test_without_a_grammar_no_step_leaves_a_draw_out() -> None:
    bench = Bench()
    bench.run(ask("a"), ask("b"))
    assert not any(plan.masked for plan in bench.recorder.plans)
