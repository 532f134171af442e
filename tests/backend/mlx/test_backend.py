"""What the backend over mlx-lm does beyond what every backend must: its prompts, its books, its
ends. The native backend and the backend itself, asked for one answer at a time, are the oracles.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models import mamba
from mlx_lm.utils import save_model

from backend.interface import (
    EXPIRED,
    Delta,
    DeviceLost,
    Finish,
    Grammar,
    Submission,
    Wants,
    Work,
)
from backend.mlx.backend import MlxBackend
from backend.mlx.library import Batch
from backend.prefix_keys import block_tokens, prefix_keys
from config import QueueSettings
from engine.engine import Engine
from engine.opening import open_backend
from tests.backend.mlx.drivers import edited_copy, native_answers, opened, settings_of
from tests.conformance.cases import PLAIN, PROMPTS, SAMPLINGS, VOCABULARY, ask, prompt
from tests.conformance.driver import Driver

LONG = prompt(50, 100)


def deltas(driver: Driver, *submissions: Submission) -> list[Delta]:
    """All news until everything has ended, the books balanced after each step."""
    for submission in submissions:
        driver.backend.submit(submission)
    news = list(driver.backend.advance(0).deltas)
    while not driver.idle:
        news += driver.backend.advance(0.01).deltas
        balance(driver)
    return news


def balance(driver: Driver) -> None:
    load = driver.backend.load()
    assert load.pages_free + load.pages_cached + load.pages_leased == load.pages_total
    assert min(load.pages_free, load.pages_cached, load.pages_leased) >= 0


def test_answers_and_log_probabilities_are_those_of_the_native_backend(llama: Path) -> None:
    wants = Wants(logprobs=True, prompt_logprobs_from=0, top=4)
    asked = [ask(str(number), ids, wants=wants) for number, ids in enumerate([*PROMPTS, LONG])]
    found = opened(llama, max_step_tokens=17, pages=256).run(*asked)
    for one, other in zip(found, native_answers(llama, *asked), strict=True):
        assert one.tokens == other.tokens
        for mine, theirs in zip(
            one.prompt_logprobs + one.logprobs,
            other.prompt_logprobs + other.logprobs,
            strict=True,
        ):
            assert mine.token == theirs.token
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            for (_, best), (_, wanted) in zip(mine.top, theirs.top, strict=True):
                assert best == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_whoever_comes_goes_and_leaves_each_answer_is_what_it_is_alone(
    llama: Path, seed: int
) -> None:
    rng = random.Random(seed)
    stem = prompt(7, 40)
    submissions = [
        ask(
            str(number),
            (*stem[: rng.randint(0, 40)], *prompt(number, rng.randint(1, 9))),
            replace(rng.choice(SAMPLINGS[:5]), max_new_tokens=rng.randint(4, 40)),
            seed=number,
            wants=rng.choice([Wants(), Wants(logprobs=True), Wants(prompt_logprobs_from=0)]),
        )
        for number in range(10)
    ]
    alone = opened(llama, prefix=False)
    knobs: dict[str, Any] = {"pages": 60, "max_running": 4, "max_step_tokens": rng.choice([5, 32])}
    driver = opened(llama, **knobs)
    gone = {str(number) for number in rng.sample(range(10), 3)}
    left = list(submissions)
    while left or not driver.idle:
        if left and rng.random() < 0.4:
            driver.submit(left.pop(0))
        if rng.random() < 0.2:
            driver.backend.cancel(rng.choice(sorted(gone)))
        driver.advance()
        balance(driver)
    for submission in submissions:
        (right,) = alone.run(submission)
        answer = driver.answers[submission.id]
        aborted = answer.finishes == [Finish("abort")]
        assert aborted <= (submission.id in gone)
        expected = right.tokens[: len(answer.tokens)] if aborted else right.tokens
        assert answer.tokens == expected


def test_prompts_of_a_step_fit_its_budget(llama: Path) -> None:
    driver = opened(llama, max_step_tokens=24, pages=256)
    for number in range(8):
        driver.submit(ask(str(number), prompt(number, 5 + 7 * (number % 3))))
    most = 0
    while not driver.idle:
        output = driver.backend.advance(0.01)
        most = max(most, output.step_tokens)
    assert 5 < most <= 24 + 8  # and a token of each row


def test_what_is_read_for_nobody_is_kept_to_its_last_whole_page(llama: Path) -> None:
    driver = opened(llama)
    (answer,) = driver.run(ask("warm", LONG[:32], replace(PLAIN, max_new_tokens=0)))
    assert (answer.tokens, answer.finishes) == ([], [Finish("length")])
    assert driver.run(ask("a", LONG[:40]))[0].cached == [32]


def test_a_prompt_that_is_given_up_is_kept_as_far_as_it_was_computed(llama: Path) -> None:
    for wants, known in ((Wants(), 20), (Wants(prompt_logprobs_from=0), 20)):
        driver = opened(llama, max_step_tokens=10)
        driver.submit(ask("gone", LONG, wants=wants))
        for _ in range(2):
            driver.advance()
        driver.backend.cancel("gone")
        driver.drain()
        assert driver.answers["gone"].prompt_logprobs == []
        assert driver.run(ask("a", LONG))[0].cached == [known]


def test_prefixes_that_come_and_go_are_told_by_the_names_that_the_front_knows(llama: Path) -> None:
    driver = opened(llama)
    block = block_tokens(driver.spec.page_tokens)
    entered: list[int] = []
    driver.backend.submit(ask("a", LONG, namespace="salt"))
    while not driver.idle:
        output = driver.backend.advance(0.01)
        assert not output.evicted
        entered += output.entered
    assert entered == prefix_keys("salt", LONG, block)
    driver.backend.flush()
    assert list(driver.backend.advance(0).evicted) == entered


def test_the_work_of_an_answer_is_counted(llama: Path) -> None:
    driver = opened(llama, max_step_tokens=10)
    (alone,) = [each.work for each in deltas(driver, ask("a", PROMPTS[3])) if each.finish]
    assert alone is not None
    assert (alone.rows, alone.yields, alone.computed) == (alone.steps, 0, 16)
    assert alone.steps >= 12
    (again,) = [each.work for each in deltas(driver, ask("b", PROMPTS[3])) if each.finish]
    assert again is not None
    assert again.computed == 4  # the rest was kept
    both = [each.work for each in deltas(driver, ask("c"), ask("d")) if each.finish]
    for work in both:
        assert work is not None
        assert 1.5 < work.rows / work.steps <= 2
    (never,) = deltas(driver, ask("e", received=(1,) * 12))
    assert never.work == Work(0, 0, 0, 0)


def test_who_waits_too_long_is_given_up_and_who_runs_is_not(llama: Path) -> None:
    driver = opened(llama, max_running=1)
    driver.submit(ask("runs", deadline=time.monotonic() + 0.05))
    driver.advance()
    driver.submit(ask("waits", deadline=time.monotonic()))
    driver.drain()
    assert driver.answers["waits"].finishes == [EXPIRED]
    assert driver.answers["runs"].finishes == [Finish("length")]


def test_who_waits_for_a_grammar_holds_up_nobody_and_one_that_is_wrong_ends_one_answer(
    llama: Path,
) -> None:
    driver = opened(llama)
    bound = replace(PLAIN, grammar=Grammar("regex", "("))
    free, wrong = driver.run(ask("free"), ask("wrong", sampling=bound))
    assert len(free.tokens) == 12
    (finish,) = wrong.finishes
    assert finish.reason == "error"
    assert "the regex cannot be honoured" in str(finish.message)


def test_a_failure_of_mlx_ends_everything_with_one_line(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Batch) -> None:
        raise RuntimeError("[metal] out of memory\nand more that nobody wants to read")

    backend = open_backend(settings_of(llama))
    engine = Engine(open_backend(settings_of(llama)), QueueSettings())
    for name in "ab":
        engine.submit(ask(name))
    monkeypatch.setattr(Batch, "step", fail)
    news = engine.step().deltas
    assert {each.id: each.finish and each.finish.reason for each in news} == {
        "a": "error",
        "b": "error",
    }
    assert engine.failure == "the backend failed: DeviceLost: mlx failed: [metal] out of memory"
    backend.submit(ask("c"))
    with pytest.raises(DeviceLost, match=r"^mlx failed: \[metal\] out of memory$"):
        backend.advance(0)


def test_warming_up_runs_as_many_steps_as_the_context_has_room_for(llama: Path) -> None:
    driver = opened(llama, pages=8)
    assert driver.backend.warm(5) == 5
    assert driver.backend.warm(1000) == 8 * 4 - 1
    assert driver.backend.load().pages_free == 8
    assert isinstance(driver.backend, MlxBackend)
    assert not driver.backend.prepare()


@pytest.fixture(scope="module")
def sliding(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first layer sees the last eight positions, and keeps no others."""
    return edited_copy(
        llama,
        tmp_path_factory.mktemp("sliding") / "model",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    )


def test_a_full_window_is_kept_whole_for_the_turn_behind_it(sliding: Path) -> None:
    driver, alone = opened(sliding), opened(sliding, prefix=False)
    first = ask("first", PROMPTS[3])
    (answer,) = driver.run(first)
    turn = (*PROMPTS[3], *answer.tokens, 9, 9)
    second, third = ask("second", turn), ask("third", (*PROMPTS[3], 9, 9))
    found = driver.run(second)[0]
    assert found.cached == [16 + 12]
    assert found.tokens == alone.run(second)[0].tokens
    found = driver.run(third)[0]
    assert found.cached == [0]  # its window is not what the kept one has
    assert found.tokens == alone.run(third)[0].tokens


def test_no_answer_depends_on_its_company_where_windows_slide(sliding: Path) -> None:
    submissions = [ask(str(number), ids) for number, ids in enumerate(PROMPTS)]
    alone = opened(sliding, prefix=False)
    together = opened(sliding, prefix=False, max_step_tokens=11).run(*submissions)
    for submission, answer in zip(submissions, together, strict=True):
        assert answer.tokens == alone.run(submission)[0].tokens


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mamba: nothing but a state of fixed size for each row."""
    folder = tmp_path_factory.mktemp("states")
    config = {
        "model_type": "mamba",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "tie_word_embeddings": False,
    }
    mx.random.seed(0)
    model = mamba.Model(mamba.ModelArgs(**config))
    wild = tree_map(
        lambda w: w if w.ndim < 2 else 0.3 * mx.random.normal(w.shape), model.parameters()
    )
    model.update(wild)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return folder


def test_states_answer_alike_in_any_company_and_are_kept_whole(states: Path) -> None:
    submissions = [ask(str(number), ids) for number, ids in enumerate(PROMPTS)]
    driver, alone = opened(states), opened(states, prefix=False)
    answers = driver.run(*submissions)
    for submission, answer in zip(submissions, answers, strict=True):
        assert answer.tokens == alone.run(submission)[0].tokens
    turn = ask("turn", (*PROMPTS[3], *answers[3].tokens, 9, 9))
    (found,) = driver.run(turn)
    assert found.cached == [16 + 12]
    assert found.tokens == alone.run(turn)[0].tokens
