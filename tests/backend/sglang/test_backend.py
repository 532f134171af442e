"""The adapter over a double of SGLang: bursts, late news, refusals, and what it makes of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backend.interface import EXPIRED, Delta, Finish, SamplingParams, Submission, Wants
from backend.sglang.backend import SglangBackend
from tests.backend.sglang.engine_double import Script, stand_in
from tests.backend.sglang.opened import driven, settings, write_folder
from tests.conformance.cases import END, PLAIN, PROMPTS, ask
from tests.conformance.driver import Answer, Driver


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """What happens; may be changed before or after the start."""
    return stand_in(monkeypatch)


@pytest.fixture
def driver(folder: Path, script: Script) -> Iterator[Driver]:
    with driven(settings(folder)) as driver:
        yield driver


def deltas_of(driver: Driver, submission: Submission) -> list[Delta]:
    """All news of one answer."""
    driver.submit(submission)
    found: list[Delta] = []
    while not (found and found[-1].finish):
        for delta in driver.backend.advance(0.1).deltas:
            driver.answers[delta.id].add(delta)
            found.append(delta)
    return found


def until(driver: Driver, id: str, tokens: int) -> None:
    """Let an answer come so far."""
    while len(driver.answers[id].tokens) < tokens:
        driver.advance()


def test_a_burst_comes_as_one_delta(driver: Driver, script: Script) -> None:
    alone = [delta.tokens for delta in deltas_of(driver, ask("a"))]
    script.quiet_steps = 4
    burst = [delta.tokens for delta in deltas_of(driver, ask("b"))]
    assert len(burst) <= 4 < len(alone)
    assert [token for tokens in burst for token in tokens] == [t for ts in alone for t in ts]


def test_log_probabilities_of_a_burst_stay_beside_their_tokens(
    driver: Driver, script: Script
) -> None:
    wants = Wants(logprobs=True, top=2)
    (one_by_one,) = driver.run(ask("a", wants=wants))
    script.quiet_steps = 4
    (burst,) = driver.run(ask("b", wants=wants))
    assert burst.logprobs == one_by_one.logprobs
    assert [each.token for each in burst.logprobs] == burst.tokens


def test_news_after_a_cancel_are_dropped_and_the_id_is_free_at_once(
    driver: Driver, script: Script
) -> None:
    script.late_steps, script.step_s = 5, 0.002
    driver.submit(ask("a", sampling=replace(PLAIN, max_new_tokens=60)))
    until(driver, "a", 3)
    driver.backend.cancel("a")
    driver.advance()
    assert driver.answers["a"].finishes == [Finish("abort")]
    (again,) = driver.run(ask("a"))
    assert (len(again.tokens), again.finishes) == (12, [Finish("length")])


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancel_ends_no_other_whose_id_begins_alike(
    folder: Path, script: Script, begun: bool
) -> None:
    script.step_s = 0.002
    with driven(settings(folder, max_running=2)) as driver:
        ids = ["1", "10", "11", "HEALTH_CHECK"]
        for id in ids:
            driver.submit(ask(id))
        if begun:
            until(driver, "1", 2)
        driver.backend.cancel("1")
        driver.drain()
        ends = {id: driver.answers[id].finishes for id in ids}
        assert ends == {"1": [Finish("abort")], **{id: [Finish("length")] for id in ids[1:]}}


def test_a_cancel_right_behind_its_submission_reaches_sglang(
    driver: Driver, script: Script
) -> None:
    script.step_s = 0.01
    driver.submit(ask("a", sampling=replace(PLAIN, max_new_tokens=80)))
    driver.backend.cancel("a")
    driver.advance()
    assert driver.answers["a"].finishes == [Finish("abort")]
    begun = time.monotonic()
    driver.backend.flush()  # as soon as nothing runs
    assert time.monotonic() - begun < 0.4


def test_what_sglang_would_not_take_ends_with_its_reason_and_nobody_else_does(
    driver: Driver, script: Script
) -> None:
    script.refuse = lambda fields: (
        ValueError("no such\nthing") if fields["input_ids"] == [9] else None
    )
    refused, served = driver.run(ask("a", (9,)), ask("b"))
    assert refused.finishes == [Finish("error", message="SGLang: ValueError: no such")]
    assert refused.cached == [0]
    assert served.finishes == [Finish("length")]


def test_what_sglang_cannot_serve_ends_with_its_reason(driver: Driver) -> None:
    # one that nobody checked: it is longer than what is promised
    long = ask("a", (7,) * (driver.spec.max_model_len + 3), replace(PLAIN, max_new_tokens=1))
    driver.answers["a"] = Answer()
    driver.backend.submit(long)
    driver.drain()
    message = "SGLang: Input length exceeds the maximum allowed length"
    assert driver.answers["a"].finishes == [Finish("error", message=message)]


def test_an_answer_cut_short_by_sglang_is_no_whole_answer(driver: Driver) -> None:
    # one that nobody checked: it reaches into what SGLang keeps free
    prompt = (7,) * (driver.spec.max_model_len - 5)
    driver.answers["a"] = Answer()
    driver.backend.submit(ask("a", prompt, replace(PLAIN, max_new_tokens=12)))
    driver.drain()
    message = "SGLang ended the answer 2 tokens early"
    assert driver.answers["a"].finishes == [Finish("error", message=message)]


# Ends


def test_an_end_that_sglang_must_not_look_for_ends_the_answer_and_the_work(
    driver: Driver, script: Script
) -> None:
    (free,) = driver.run(ask("free", sampling=replace(PLAIN, max_new_tokens=90)))
    script.step_s = 0.005
    stop = free.tokens[3]
    sampling = replace(PLAIN, max_new_tokens=90, stop_token_ids=(stop,), ignore_eos=True)
    (stopped,) = driver.run(ask("a", sampling=sampling))
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.finishes == [Finish("stop", matched=stop)]
    begun = time.monotonic()
    driver.backend.flush()
    assert time.monotonic() - begun < 0.3, "SGLang went on"


def test_an_end_at_the_very_last_token_is_an_end(driver: Driver) -> None:
    (free,) = driver.run(ask("free"))
    at = next(at for at in range(3, 12) if free.tokens.index(free.tokens[at]) == at)
    for ignore in (False, True):
        sampling = replace(
            PLAIN, max_new_tokens=at + 1, stop_token_ids=(free.tokens[at],), ignore_eos=ignore
        )
        (answer,) = driver.run(ask(f"a{ignore}", sampling=sampling))
        assert answer.finishes == [Finish("stop", matched=free.tokens[at])]


def test_ends_are_those_of_the_generation_config_also_where_sglang_knows_more(
    folder: Path, script: Script
) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    with driven(settings(folder)) as driver:
        assert driver.spec.stop_ids == (5, 6)
        lifted = SamplingParams(max_new_tokens=4, logit_bias=((END, 100.0),))
        (goes_on,) = driver.run(ask("a", sampling=lifted))
        assert (goes_on.tokens, goes_on.finishes) == ([END] * 4, [Finish("length")])
        ended = replace(lifted, logit_bias=((6, 100.0),))
        assert driver.run(ask("b", sampling=ended))[0].finishes == [Finish("stop", matched=6)]


def test_an_answer_that_was_received_whole_ends_at_once(driver: Driver) -> None:
    sampling = replace(PLAIN, max_new_tokens=2)
    (answer,) = driver.run(ask("a", sampling=sampling, received=(8, 9)))
    assert (answer.tokens, answer.finishes) == ([], [Finish("length")])


def test_prompt_scores_come_once_and_not_again_with_the_rest(driver: Driver) -> None:
    wants = Wants(logprobs=True, prompt_logprobs_from=2)
    whole = deltas_of(driver, ask("a", wants=wants))
    assert len(whole[0].prompt_logprobs) == len(PROMPTS[2]) - 3
    assert not any(delta.prompt_logprobs for delta in whole[1:])
    received = tuple(token for delta in whole[:4] for token in delta.tokens)
    rest = deltas_of(driver, ask("b", wants=wants, received=received))
    assert not any(delta.prompt_logprobs for delta in rest)
    assert rest[0].cached is not None
    assert rest[0].cached <= len(PROMPTS[2])


def test_an_answer_whose_scores_are_those_of_other_logits_comes_as_one(driver: Driver) -> None:
    sampling = replace(PLAIN, logit_bias=((8, 100.0),), max_new_tokens=5)
    wants = Wants(logprobs=True, top=3, prompt_logprobs_from=0)
    (delta,) = deltas_of(driver, ask("a", sampling=sampling, wants=wants))
    assert list(delta.tokens) == [8] * 5
    assert max(each.logprob for each in delta.logprobs) < -0.1  # by the biased logits: about 0
    assert [len(each.top) for each in delta.logprobs] == [3] * 5
    assert len(delta.prompt_logprobs) == len(PROMPTS[2]) - 1
    assert delta.cached == 0


@pytest.mark.parametrize("moment", range(1, 8))
def test_an_answer_that_is_held_back_can_be_cancelled_at_any_moment(
    driver: Driver, script: Script, moment: int
) -> None:
    script.step_s = 0.003
    sampling = replace(PLAIN, logit_bias=((8, 100.0),), max_new_tokens=4)
    driver.submit(ask("a", sampling=sampling, wants=Wants(logprobs=True)))
    for _ in range(moment):
        driver.advance()
    driver.backend.cancel("a")
    driver.drain()
    answer = driver.answers["a"]
    assert answer.finishes in ([Finish("abort")], [Finish("length")])
    assert len(answer.cached) == 1


# Groups, deadlines, load


def test_when_the_first_of_a_group_goes_another_computes_the_prompt(
    folder: Path, script: Script
) -> None:
    script.step_s = 0.003
    with driven(settings(folder, max_step_tokens=4)) as driver:
        group = [ask(str(index), PROMPTS[5], group="g", seed=index) for index in range(4)]
        for submission in group:
            driver.submit(submission)
        driver.advance()
        assert driver.backend.load().running + driver.backend.load().waiting == 4
        driver.backend.cancel("0")
        driver.backend.cancel("2")
        driver.drain()
        assert driver.answers["0"].finishes == driver.answers["2"].finishes == [Finish("abort")]
        assert driver.answers["2"].cached == [0]
        first, last = driver.answers["1"], driver.answers["3"]
        assert first.finishes == last.finishes == [Finish("length")]
        assert last.cached == [28]  # all whole pages of 30 tokens


def test_who_still_waits_at_its_deadline_is_given_up_and_who_runs_is_not(
    folder: Path, script: Script
) -> None:
    script.step_s = 0.01
    with driven(settings(folder, max_running=1)) as driver:
        soon = time.monotonic() + 0.05
        driver.submit(ask("runs", deadline=soon))
        driver.submit(ask("waits", deadline=soon))
        driver.drain()
        assert driver.answers["runs"].finishes == [Finish("length")]
        assert driver.answers["waits"].finishes == [EXPIRED]


def test_load_tells_rows_and_pages_of_what_is_under_way(folder: Path, script: Script) -> None:
    script.step_s = 0.005
    with driven(settings(folder, max_running=2)) as driver:
        for id in "abc":
            driver.submit(ask(id, PROMPTS[3]))  # 16 tokens, four pages each
        until(driver, "b", 3)
        load = driver.backend.load()
        assert (load.running, load.waiting) == (2, 1)
        # four pages of each prompt, which began side by side, and of each answer one or two
        assert 10 <= load.pages_leased <= 12
        assert load.pages_free + load.pages_cached + load.pages_leased == load.pages_total == 64
        driver.drain()
        assert driver.backend.load().steps > 0


def test_a_row_that_had_to_yield_is_counted(folder: Path, script: Script) -> None:
    with driven(settings(folder, pages=9, page_tokens=4)) as driver:
        driver.run(*(ask(str(index), PROMPTS[2], namespace=str(index)) for index in range(4)))
        assert driver.backend.load().preemptions > 0


def test_a_flush_waits_for_nobody_and_frees_nothing_while_something_runs(
    driver: Driver, script: Script
) -> None:
    script.step_s = 0.01
    driver.submit(ask("a"))
    until(driver, "a", 2)
    assert driver.backend.flush() == 0
    driver.drain()
    assert driver.backend.flush() > 0


def test_prefixes_are_told_as_they_enter_and_leave(folder: Path, script: Script) -> None:
    with driven(settings(folder)) as driver:
        driver.submit(ask("a", tuple(range(5, 75))))  # more than a block
        entered: list[int] = []
        while not driver.answers["a"].finishes:
            output = driver.backend.advance(0.1)
            entered += output.entered
            for delta in output.deltas:
                driver.answers[delta.id].add(delta)
        assert len(entered) == 1
        driver.backend.flush()
        assert driver.backend.advance(0.0).evicted == entered


def test_a_step_counts_what_was_computed_for_it(driver: Driver) -> None:
    driver.run(ask("a", PROMPTS[3]), ask("b", PROMPTS[3][::-1]))
    assert driver.step_tokens == 2 * (16 + 12)
    driver.run(ask("c", PROMPTS[3]))
    assert driver.step_tokens == 2 * (16 + 12) + 4 + 12  # 12 positions were cached


def test_without_determinism_there_are_no_seeds_and_every_filter(
    folder: Path, script: Script
) -> None:
    with driven(settings(folder, deterministic=False)) as driver:
        assert "seed" in driver.spec.lacks
        assert "min_p" not in driver.spec.lacks
        wild: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 12, "ignore_eos": True}
        (greedy,) = driver.run(ask("a"))
        for name, narrow in (("min_p", 1.0), ("top_p", 1e-6), ("top_k", 1)):
            sampling = SamplingParams(**{**wild, name: narrow})
            assert driver.run(ask(name, sampling=sampling))[0].tokens == greedy.tokens
        both = SamplingParams(**wild, top_k=2, top_p=0.5)
        assert driver.run(ask("both", sampling=both))[0].finishes == [Finish("length")]


def test_the_descriptor_turns_readable_when_something_came(driver: Driver) -> None:
    import select

    poll = select.poll()
    assert type(driver.backend) is SglangBackend
    poll.register(driver.backend.fileno(), select.POLLIN)
    assert not poll.poll(20)
    driver.submit(ask("a"))
    assert poll.poll(2000)
    driver.drain()
    driver.advance()
    assert not poll.poll(20)
