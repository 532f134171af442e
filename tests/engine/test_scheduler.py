"""The hard spots of the scheduler, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backend.interface import BackendFailed, Finish, Submission, Wants
from backend.prefix_keys import prefix_keys
from tests.conformance.driver import Answer
from tests.engine.scheduler_bench import Bench, alone, ask, seed_of


def right_tokens(bench: Bench, submission: Submission) -> list[int]:
    return alone(bench.model, bench.spec, submission).tokens


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_youngest_yields_its_pages_and_comes_back_to_finish_its_answer(depth: int) -> None:
    bench = Bench(pages=11, page_tokens=1, depth=depth)
    old, young = ask("old", (1,), 8), ask("young", (2, 2), 8)
    answers = bench.run(old, young)
    assert [answer.tokens for answer in answers] == [
        right_tokens(bench, old),
        right_tokens(bench, young),
    ]
    assert bench.backend.load().preemptions > 0
    assert len(bench.recorder.starts[old.seed]) == 1
    assert len(bench.recorder.starts[young.seed]) > 1


def test_a_sequence_that_yielded_finds_its_pages_in_the_tree() -> None:
    bench = Bench(pages=11, page_tokens=1)
    young = ask("young", (2, 2), 8)
    bench.run(ask("old", (1,), 8), young)
    begun, again = bench.recorder.starts[young.seed]
    assert begun == 0
    assert again > len(young.prompt)


def test_a_sequence_that_yielded_goes_before_those_that_still_wait() -> None:
    bench = Bench(pages=11, page_tokens=1, max_running=2)
    bench.run(ask("old", (1,), 8), ask("young", (2, 2), 8), ask("waits", (3,), 2))
    assert bench.recorder.order == [seed_of(id) for id in ("old", "young", "young", "waits")]


def test_a_prompt_that_yields_half_scored_is_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.scheduler.HEADROOM_TOKENS", 0)
    bench = Bench(pages=12, page_tokens=1, max_step_tokens=2, prefix=False)
    scored = ask("scored", range(10), 1, wants=Wants(prompt_logprobs_from=0))
    _, answer = bench.run(ask("old", (1,), 9), scored)
    assert bench.backend.load().preemptions > 0
    assert answer.prompt_logprobs == alone(bench.model, bench.spec, scored).prompt_logprobs


def test_a_yield_does_not_change_what_was_reported_as_cached() -> None:
    bench = Bench(pages=11, page_tokens=1)
    _, young = bench.run(ask("old", (1,), 8), ask("young", (2, 2), 8))
    assert young.cached == [0]


def test_a_stop_met_while_later_steps_are_in_flight_ends_the_answer_there() -> None:
    bench = Bench(depth=3)
    tokens = right_tokens(bench, ask("free", new=12))
    stop = tokens[4]
    (answer,) = bench.run(ask("stops", new=12, stop=(stop,)))
    assert answer.tokens == tokens[: tokens.index(stop) + 1]
    assert answer.finishes == [Finish("stop", matched=stop)]
    assert sum(plan.tokens for plan in bench.recorder.plans) > 6 + len(answer.tokens)


def test_no_more_steps_are_launched_than_the_length_asks_for() -> None:
    bench = Bench(depth=3)
    bench.run(ask("a", new=5))
    assert len(bench.recorder.plans) == 5


def test_a_cancel_in_flight_keeps_the_pages_until_the_last_step_settles() -> None:
    bench = Bench(depth=3)
    other = ask("other", (7, 8, 9), 9)
    bench.submit(ask("gone", new=20))
    bench.submit(other)
    for _ in range(4):
        bench.advance()
    held = bench.cache.leased
    bench.backend.cancel("gone")
    assert bench.cache.leased == held
    bench.advance()
    assert bench.answers["gone"].finishes == [Finish("abort")]
    bench.drain()
    assert bench.answers["other"].tokens == right_tokens(bench, other)


def test_cancelling_twice_or_nobody_or_the_ended_is_ignored() -> None:
    bench = Bench()
    bench.submit(ask("a"))
    bench.backend.cancel("nobody")
    bench.advance()
    bench.backend.cancel("a")
    bench.backend.cancel("a")
    bench.drain()
    bench.backend.cancel("a")
    bench.advance()
    assert bench.answers["a"].finishes == [Finish("abort")]


def test_a_cancel_before_the_first_step_ends_a_waiting_sequence_with_nothing_cached() -> None:
    bench = Bench(max_running=1)
    bench.submit(ask("runs"))
    bench.submit(ask("waits"))
    bench.advance()
    bench.backend.cancel("waits")
    bench.drain()
    assert bench.answers["waits"] == Answer(cached=[0], finishes=[Finish("abort")])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_siblings_wait_for_the_prompt_of_the_first_and_share_its_pages(depth: int) -> None:
    bench = Bench(max_step_tokens=4, depth=depth)
    prompt = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    answers = bench.run(*(ask(f"n{index}", prompt, 1, group="n") for index in range(3)))
    assert [answer.cached for answer in answers] == [[0], [8], [8]]
    assert sum(plan.tokens for plan in bench.recorder.plans) == 10 + 2 + 2


def test_others_overtake_siblings_that_wait_for_a_prompt() -> None:
    bench = Bench(max_step_tokens=8)
    for id in ("n0", "n1"):
        bench.submit(ask(id, range(6), 4, group="n"))
    bench.submit(ask("other", (7, 7), 4))
    bench.advance()
    assert bench.recorder.starts.keys() == {seed_of("n0"), seed_of("other")}
    bench.drain()


def test_siblings_go_on_when_the_first_of_them_is_cancelled_amid_its_prompt() -> None:
    bench = Bench(max_step_tokens=2, depth=2)
    for id in ("n0", "n1", "n2"):
        bench.submit(ask(id, range(9), 3, group="n"))
    bench.advance()
    bench.backend.cancel("n0")
    bench.drain()
    right = right_tokens(bench, ask("n", range(9), 3))
    assert bench.answers["n1"].tokens == bench.answers["n2"].tokens == right


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_answer_is_cached_for_the_turn_that_follows_it(depth: int) -> None:
    bench = Bench(depth=depth)
    (first,) = bench.run(ask("first", (1, 2, 3), 7))
    (second,) = bench.run(ask("second", (1, 2, 3, *first.tokens, 4, 5), 2))
    assert second.cached == [8]


def test_the_last_token_of_a_cached_prompt_is_computed_again() -> None:
    bench = Bench()
    prompt = range(8)
    _, again = (bench.run(ask(id, prompt, 3))[0] for id in ("first", "again"))
    assert again.cached == [4]
    assert again.tokens == right_tokens(bench, ask("first", prompt, 3))


def test_a_prefix_is_not_shared_across_namespaces() -> None:
    bench = Bench()
    bench.run(ask("a", range(8), 2, namespace="one"))
    answers = bench.run(
        ask("b", range(8), 2, namespace="two"), ask("c", range(8), 2, namespace="one")
    )
    assert [answer.cached for answer in answers] == [[0], [4]]


def test_no_token_asked_for_computes_the_prompt_and_ends_with_length() -> None:
    bench = Bench(max_step_tokens=4)
    (answer,) = bench.run(ask("a", range(10), 0))
    assert answer == Answer(cached=[0], finishes=[Finish("length")])
    assert [plan.tokens for plan in bench.recorder.plans] == [4, 4, 2]


@pytest.mark.parametrize("new", [0, 3])
@pytest.mark.parametrize("step", [1, 3, 4, 16])
@pytest.mark.parametrize("start", [0, 5, 9])
def test_prompt_scores_are_complete_and_in_order_whatever_the_chunks(
    new: int, step: int, start: int
) -> None:
    bench = Bench(max_step_tokens=step)
    scored = ask("a", range(10), new, wants=Wants(prompt_logprobs_from=start, top=2))
    bench.run(ask("warms the cache", range(10), 1))
    (answer,) = bench.run(scored)
    assert answer.prompt_logprobs == alone(bench.model, bench.spec, scored).prompt_logprobs
    assert len(answer.prompt_logprobs) == 9 - start
    assert answer.cached == [start // 4 * 4]


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    bench = Bench(max_step_tokens=4)
    bench.submit(ask("first", (1,), 12))
    bench.advance()
    bench.submit(ask("long", range(24), 2))
    for step in range(8):
        assert len(bench.answers["first"].tokens) == 1 + step
        bench.advance()
    assert [plan.tokens for plan in bench.recorder.plans[1:]] == [4] * 8
    bench.drain()


def test_sequences_start_in_the_order_of_their_arrival() -> None:
    bench = Bench(max_running=2, pages=16)
    ids = [f"s{index}" for index in range(6)]
    bench.run(*(ask(id, [index] * (1 + index % 3), 2 + index) for index, id in enumerate(ids)))
    assert list(bench.recorder.starts) == [seed_of(id) for id in ids]


def test_a_sequence_too_large_for_now_is_not_overtaken_by_a_small_one() -> None:
    bench = Bench(pages=8, page_tokens=1)
    for submission in (ask("a", (1,), 5), ask("large", [2] * 6, 2), ask("small", (3,), 1)):
        bench.submit(submission)
    bench.drain()
    assert list(bench.recorder.starts) == [seed_of(id) for id in ("a", "large", "small")]


def test_a_resumed_answer_goes_on_behind_the_ids_it_is_given() -> None:
    bench = Bench()
    whole = right_tokens(bench, ask("whole", new=8))
    resumed, ended = bench.run(
        ask("resumed", new=8, received=tuple(whole[:3])),
        ask("ended", new=8, received=tuple(whole)),
    )
    assert resumed.tokens == whole[3:]
    assert ended == Answer(cached=[0], finishes=[Finish("length")])


def test_the_least_length_of_a_resumed_answer_counts_what_was_received() -> None:
    bench = Bench()
    tokens = right_tokens(bench, ask("free", new=8))
    stop = next(token for token in tokens[3:] if token not in tokens[:3])
    at = tokens.index(stop)
    asked = ask("resumed", new=8, received=tuple(tokens[:2]), stop=(stop,))
    sampling = replace(asked.sampling, min_new_tokens=at)
    (answer,) = bench.run(replace(asked, sampling=sampling))
    assert answer.tokens == tokens[2 : at + 1]
    assert answer.finishes == [Finish("stop", matched=stop)]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_lost_device_raises_and_says_so(depth: int) -> None:
    bench = Bench(fail_at_step=3, depth=depth)
    bench.submit(ask("a", new=9))
    for _ in range(1 + depth):
        bench.advance()
    assert len(bench.answers["a"].tokens) == 2
    with pytest.raises(BackendFailed, match="step 3"):
        bench.advance()


def test_warming_up_runs_as_many_steps_as_asked_and_holds_nothing_afterwards() -> None:
    bench = Bench(depth=2)
    assert bench.backend.warm(5) == 5
    assert bench.cache.leased == 0
    (answer,) = bench.run(ask("a", (0, 0, 0, 0, 0, 0), 2))
    assert answer.cached == [0]


def test_flushing_makes_the_next_prompt_pay_again() -> None:
    bench = Bench()
    bench.run(ask("a", range(9), 1))
    assert bench.backend.flush() == 2
    (answer,) = bench.run(ask("b", range(9), 1))
    assert answer.cached == [0]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_says_which_prefixes_it_brought_into_the_cache(
    monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setattr("backend.prefix_keys.BLOCK_TOKENS", 8)
    bench = Bench(max_step_tokens=8, depth=depth)
    (answer,) = Bench().run(ask("same", range(20), 6))
    bench.submit(ask("a", range(20), 6))
    outputs = [bench.backend.advance(0.0) for _ in range(10)]
    keys = prefix_keys("", [*range(20), *answer.tokens], 8)
    steps = [list(output.entered) for output in outputs if output.step_tokens]
    assert steps[:3] == [keys[:1], keys[1:2], []]
    assert [key for step in steps for key in step] == keys
    assert not any(output.evicted for output in outputs)


def test_what_a_flush_gave_up_is_said_though_no_step_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("backend.prefix_keys.BLOCK_TOKENS", 8)
    bench = Bench()
    bench.run(ask("a", range(17), 1))
    bench.backend.flush()
    output = bench.backend.advance(0.0)
    assert (output.step_tokens, set(output.evicted)) == (0, set(prefix_keys("", range(16), 8)))
    assert not bench.backend.advance(0.0).evicted


def test_warming_up_swallows_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.prefix_keys.BLOCK_TOKENS", 8)
    bench = Bench()
    bench.run(ask("a", range(17), 1))
    bench.backend.flush()
    bench.submit(ask("ended", new=1, received=(7,)))
    bench.backend.warm(3)
    output = bench.backend.advance(0.0)
    assert [delta.id for delta in output.deltas] == ["ended"]
    assert set(output.evicted) == set(prefix_keys("", range(16), 8))


def test_the_load_counts_rows_waiting_and_pages() -> None:
    bench = Bench(max_running=1, pages=8)
    for id in ("a", "b", "c"):
        bench.submit(ask(id, range(5), 3))
    bench.advance()
    load = bench.backend.load()
    assert (load.running, load.waiting, load.steps) == (1, 2, 1)
    assert (load.pages_total, load.pages_free, load.pages_leased) == (8, 6, 2)
    bench.drain()
