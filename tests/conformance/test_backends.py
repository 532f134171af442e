"""What every backend must do, whatever it runs on.

The oracle of a greedy answer is the same backend asked for one token at a time: prompts alone, no
batch, no cache, no decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from backend.interface import Finish, SamplingParams, Wants
from tests.conformance.cases import (
    PLAIN,
    PROMPTS,
    SAMPLINGS,
    Alone,
    Opener,
    ask,
    honoured,
    prompt,
    varied,
)
from tests.conformance.driver import Driver


def one_by_one(opened: Opener, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy answer, from nothing but the first token of ever longer prompts."""
    driver = opened(prefix=False)
    ids = list(prompt)
    for at in range(count):
        (answer,) = driver.run(ask(str(at), ids, replace(PLAIN, max_new_tokens=1)))
        ids += answer.tokens
    return ids[len(prompt) :]


# Answers that do not depend on anything else


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_a_greedy_answer_is_that_of_one_token_at_a_time(
    opened: Opener, prompt: tuple[int, ...]
) -> None:
    (answer,) = opened().run(ask("a", prompt))
    assert answer.tokens == one_by_one(opened, prompt, 12)
    assert answer.finishes == [Finish("length")]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"page_tokens": 1, "pages": 48},  # so few pages that some must yield
        {"page_tokens": 16, "max_step_tokens": 7},
        {"max_running": 2, "max_step_tokens": 3, "page_tokens": 3},
        {"prefix": False, "pages": 14},
    ],
    ids=str,
)
def test_no_answer_depends_on_its_company(
    alone: Alone, opened: Opener, knobs: dict[str, Any]
) -> None:
    driver = opened(**knobs)
    submissions = varied(driver.spec)
    for submission, answer in zip(submissions, driver.run(*submissions), strict=True):
        right = alone(submission)
        assert (answer.tokens, answer.finishes) == (right.tokens, right.finishes)


def test_no_answer_depends_on_a_cache_hit(driver: Driver) -> None:
    wants = Wants(logprobs=True, top=3)
    for ids in PROMPTS:
        first, again = (driver.run(ask(f"{len(ids)} {turn}", ids, wants=wants))[0] for turn in "ab")
        assert first.cached == [0]
        assert again.cached == [(len(ids) - 1) // 4 * 4]
        assert again.tokens == first.tokens
        for one, other in zip(first.logprobs, again.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_an_answer_is_cached_for_the_turn_behind_it(alone: Alone, opened: Opener) -> None:
    driver = opened()
    (first,) = driver.run(ask("first", PROMPTS[1]))
    turn = (*PROMPTS[1], *first.tokens, 9, 9)
    (second,) = driver.run(ask("second", turn))
    assert second.cached == [12]  # 4 + 12 tokens, the last of which was never an input
    assert second.tokens == alone(ask("a", turn)).tokens


def test_namespaces_share_no_prefix(driver: Driver) -> None:
    answers = [
        driver.run(ask(f"{turn} {name}", PROMPTS[3], namespace=name))[0]
        for turn, name in enumerate(("", "salt", "salt"))
    ]
    assert [answer.cached for answer in answers] == [[0], [0], [12]]
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens


def test_answers_of_a_group_compute_their_prompt_once(alone: Alone, opened: Opener) -> None:
    hot = replace(PLAIN, temperature=1.5)
    group = [ask(str(seed), PROMPTS[4], hot, seed=seed, group="g") for seed in range(4)]
    answers = opened().run(*group)
    assert [answer.cached for answer in answers] == [[0], [20], [20], [20]]
    assert len({tuple(answer.tokens) for answer in answers}) > 1
    for submission, answer in zip(group, answers, strict=True):
        assert answer.tokens == alone(submission).tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_a_resumed_answer_goes_on_as_if_nothing_had_happened(
    driver: Driver, sampling: SamplingParams
) -> None:
    sampling = honoured(sampling, driver.spec)
    (whole,) = driver.run(ask("whole", sampling=sampling))
    for count in range(len(whole.tokens)):
        received = tuple(whole.tokens[:count])
        (rest,) = driver.run(ask(f"from {count}", sampling=sampling, received=received))
        assert rest.tokens == whole.tokens[count:]
        assert rest.finishes == whole.finishes


# Endings


@pytest.mark.parametrize("moment", range(8))
def test_a_cancel_at_any_moment_ends_one_answer_and_leaves_the_others(
    alone: Alone, opened: Opener, moment: int
) -> None:
    driver = opened(max_running=2, max_step_tokens=12)
    submissions = varied(driver.spec)
    for submission in submissions:
        driver.submit(submission)
    for _ in range(moment):
        driver.advance()
    gone = ("0", "4")
    # of those that go on: a runtime that works by itself may have ended one by now
    before = {id: list(driver.answers[id].tokens) for id in gone if not driver.answers[id].finishes}
    for id in gone:
        driver.backend.cancel(id)
        driver.backend.cancel(id)
    driver.drain()
    for submission in submissions:
        answer, right = driver.answers[submission.id], alone(submission)
        if submission.id in before:
            assert answer.finishes == [Finish("abort")]
            assert answer.tokens == before[submission.id] == right.tokens[: len(answer.tokens)]
        else:
            assert (answer.tokens, answer.finishes) == (right.tokens, right.finishes)


def test_cancelling_the_unknown_and_the_ended_changes_nothing(driver: Driver) -> None:
    driver.backend.cancel("nobody")
    driver.run(ask("a"))
    driver.backend.cancel("a")
    driver.advance()
    assert driver.answers["a"].finishes == [Finish("length")]


def test_a_burst_is_answered_in_the_order_it_came(opened: Opener) -> None:
    driver = opened(max_running=3, max_step_tokens=16)
    begun: list[str] = []
    for index in range(9):
        driver.submit(ask(str(index), prompt(index, 10)))
    while not all(answer.finishes for answer in driver.answers.values()):
        driver.advance()
        begun += [id for id, answer in driver.answers.items() if answer.tokens and id not in begun]
    assert begun == [str(index) for index in range(9)]


def test_an_idle_backend_has_nothing_to_say_and_does_not_block(driver: Driver) -> None:
    driver.advance()
    driver.run(ask("a"))
    driver.advance()
    assert driver.idle
    driver.backend.fileno()


def test_warming_up_leaves_no_trace(driver: Driver) -> None:
    assert driver.backend.warm(3) == 3
    assert driver.idle
    (answer,) = driver.run(ask("a", (0,) * 9))
    assert answer.cached == [0]


def test_flushing_gives_up_what_was_cached(driver: Driver) -> None:
    driver.run(ask("a", PROMPTS[4]))
    assert driver.backend.flush() == driver.spec.pages_for(23 + 12) - 1
    assert driver.run(ask("b", PROMPTS[4]))[0].cached == [0]


# Seeds


def test_a_seed_decides_the_answer_and_another_seed_another(driver: Driver) -> None:
    hot = replace(PLAIN, temperature=2.0)
    seeds = [0, 1, 2, 2**62, 2**63 - 1]
    first = driver.run(*(ask(f"a{seed}", sampling=hot, seed=seed) for seed in seeds))
    again = driver.run(*(ask(f"b{seed}", sampling=hot, seed=seed) for seed in reversed(seeds)))
    assert [each.tokens for each in first] == [each.tokens for each in reversed(again)]
    assert len({tuple(answer.tokens) for answer in first}) == len(seeds)


def test_a_seed_does_not_matter_to_a_greedy_answer(driver: Driver) -> None:
    one, other = driver.run(ask("a", seed=1), ask("b", seed=2))
    assert one.tokens == other.tokens
