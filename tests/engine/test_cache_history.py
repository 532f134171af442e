"""What is remembered of caches: bounded, and private to who asked."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings, strategies as st

from backend.interface import SamplingParams, Submission
from backend.prefix_keys import prefix_keys
from engine.cache_history import (
    EVICTIONS,
    RECENT_TOKENS,
    CacheHistory,
    Explanation,
    Question,
    common,
)
from engine.live_request import LiveRequest

PAGE, BLOCK = 16, 64
IDS = tuple(range(200))


def request(ids: tuple[int, ...], owner: str = "me", replica: int = 0) -> LiveRequest:
    submission = Submission("x", ids, SamplingParams(max_new_tokens=1), seed=0)
    found = LiveRequest(submission, "x", owner, lambda _: None)
    found.replica = replica
    return found


def ask(history: CacheHistory, ids: tuple[int, ...] = IDS) -> list[Explanation]:
    return asyncio.run(history.explain(Question("me", "", ids, PAGE, now=10.0), [0, 1]))


def keys(ids: tuple[int, ...] = IDS) -> list[int]:
    return prefix_keys("", ids, BLOCK)


def test_nothing_known_is_cold() -> None:
    assert [each.reason for each in ask(CacheHistory())] == ["cold", "cold"]


def test_each_replica_has_a_claim_of_its_own() -> None:
    history = CacheHistory()
    history.told(0, keys()[:1], (), 1.0)
    history.told(1, keys(), (), 1.0)
    assert [each.hit for each in ask(history)] == [64, 192]


def test_a_block_that_left_is_dated_until_it_comes_back() -> None:
    history = CacheHistory()
    history.told(0, keys(), (), 1.0)
    history.told(0, (), keys()[1:], 4.0)
    found = ask(history)[0]
    assert (found.hit, found.reason, found.evicted_s) == (64, "evicted", 6.0)
    history.told(0, keys()[1:], (), 5.0)
    assert ask(history)[0].reason == "all"


def test_prompts_of_others_lengthen_a_claim_as_they_do_an_answer_but_are_never_shown() -> None:
    history = CacheHistory()
    history.computed(request((*IDS[:60], *(7,) * 60), owner="somebody else"))
    found = ask(history)[0]
    assert (found.hit, found.reason, found.at, found.theirs) == (48, "cold", None, ())


def test_a_prompt_of_ones_own_is_shown_around_the_place_where_it_parts() -> None:
    history = CacheHistory()
    history.computed(request((*IDS[:60], *(7,) * 60)))
    found = ask(history)[0]
    assert (found.hit, found.reason, found.at) == (48, "diverged", 60)
    assert found.theirs == (*IDS[52:60], *(7,) * 8)


def test_what_went_out_with_a_flush_or_an_engine_is_claimed_no_more() -> None:
    history = CacheHistory()
    history.computed(request(IDS[:40], replica=0))
    history.computed(request(IDS[:40], replica=1))
    assert [each.hit for each in ask(history)] == [32, 32]
    history.flushed(0)
    history.lost(1)
    assert [each.hit for each in ask(history)] == [0, 0]


def test_the_answer_counts_but_for_the_token_drawn_last() -> None:
    history = CacheHistory()
    live = request(IDS[:30])
    history.computed(live)
    live.received += IDS[30:32]  # 31 of them were given to the device
    assert ask(history)[0].hit == 16
    live.received += IDS[32:33]
    assert ask(history)[0].hit == 32


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    history = CacheHistory()
    for number in range(RECENT_TOKENS // 1000 + 10):
        history.computed(request((number,) * 999))
    past = history._pasts[0]
    assert past.tokens <= RECENT_TOKENS
    assert past.recent[0].prompt[0] > 0
    history.told(0, (), range(EVICTIONS + 5), 1.0)
    assert (len(past.evictions), min(past.evictions)) == (EVICTIONS, 5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1200), st.integers(0, 1200), st.integers(0, 1200))
def test_common_is_the_length_of_the_longest_shared_beginning(a: int, b: int, at: int) -> None:
    ours, theirs = [1] * a, [1] * b
    if at < b:
        theirs[at] = 2
    shared = 0
    while shared < min(a, b) and ours[shared] == theirs[shared]:
        shared += 1
    assert common(tuple(ours), tuple(theirs)) == shared


@pytest.mark.parametrize("length", [1, 16])
def test_a_prompt_without_a_whole_page_ahead_of_its_last_token_is_short(length: int) -> None:
    assert ask(CacheHistory(), IDS[:length])[0].reason == "short"
