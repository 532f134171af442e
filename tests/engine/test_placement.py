"""Where each policy sends a request, and the books behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from backend.prefix_keys import prefix_keys
from engine.placement import PLACEMENTS, REQUEST_TOKENS, SENT_BLOCKS, Placement, open_placement
from tests.engine.scheduler_bench import ask

PAGE_TOKENS = 16
BLOCK = 64
THREE = (0, 1, 2)
EVERY_MODE = pytest.mark.parametrize("mode", list(PLACEMENTS))


def policy(mode: str, seed: int = 0) -> Placement:
    return open_placement(mode, PAGE_TOKENS, seed)


def prompt(blocks: str, more: int = 1) -> tuple[int, ...]:
    """A block of 64 equal tokens for each letter, and `more` tokens behind them."""
    return tuple(ord(letter) for letter in blocks for _ in range(BLOCK)) + tuple(range(more))


def keys(blocks: str) -> list[int]:
    return prefix_keys("", prompt(blocks, 0), BLOCK)


def place_all(placement: Placement, count: int, free: Sequence[int] = THREE) -> list[int]:
    return [placement.choose(ask(f"p{number}"), free) for number in range(count)]


@EVERY_MODE
def test_only_a_free_replica_is_chosen(mode: str) -> None:
    placement = policy(mode)
    assert {placement.choose(ask(str(n)), (1, 3)) for n in range(40)} == {1, 3}
    assert placement.choose(ask("last"), (7,)) == 7


@EVERY_MODE
def test_a_request_is_in_flight_until_it_ends_or_its_replica_is_lost(mode: str) -> None:
    placement = policy(mode)
    for id, replica in (("a", 0), ("b", 1), ("c", 1)):
        placement.choose(ask(id), (replica,))
    placement.began("a")
    placement.began("nobody")
    assert [placement.inflight(each) for each in THREE] == [1, 2, 0]
    for id in ("a", "a", "nobody"):
        placement.ended(id)
    assert placement.inflight(0) == 0
    placement.lost(1)
    placement.ended("b")
    assert [placement.inflight(each) for each in THREE] == [0, 0, 0]


@EVERY_MODE
def test_members_of_a_group_follow_the_first_while_it_is_free(mode: str) -> None:
    placement = policy(mode)
    first = placement.choose(ask("n0", group="n"), THREE)
    others = tuple(each for each in THREE if each != first)
    place_all(placement, 5)
    assert placement.choose(ask("n1", group="n"), THREE) == first
    assert placement.choose(ask("n2", group="n"), others) != first
    assert placement.choose(ask("n3", group="n"), THREE) == first
    placement.lost(first)
    assert placement.choose(ask("n4", group="n"), others) in others


@EVERY_MODE
def test_a_group_is_forgotten_with_its_last_member(mode: str) -> None:
    placement = policy(mode)
    placement.choose(ask("n0", group="n"), (2,))
    placement.ended("n0")
    assert {placement.choose(ask(f"n{n}", group=f"g{n}"), THREE) for n in range(30)} == {*THREE}


def test_round_robin_takes_turns_and_passes_over_those_that_are_full() -> None:
    placement = policy("rr")
    assert place_all(placement, 4) == [0, 1, 2, 0]
    assert placement.choose(ask("a"), (0, 2)) == 2
    assert placement.choose(ask("b"), (1, 2)) == 1
    assert placement.choose(ask("c"), (0, 1)) == 0


def test_the_fewest_in_flight_are_served_first_and_equals_take_turns() -> None:
    placement = policy("fsfs")
    assert place_all(placement, 4) == [0, 1, 2, 0]
    placement.ended("p2")
    assert placement.choose(ask("a"), THREE) == 2
    assert placement.choose(ask("b"), THREE) == 1
    for id in ("p0", "p3"):
        placement.ended(id)
    assert [placement.choose(ask(id), THREE) for id in "cd"] == [0, 2]


def test_chance_is_decided_by_its_seed() -> None:
    once, again, other = (place_all(policy("random", seed), 30) for seed in (1, 1, 2))
    assert once == again != other
    assert {*once} == {*THREE}


def test_a_prompt_goes_where_the_most_of_it_is_cached() -> None:
    placement = policy("cache_aware")
    placement.cached(0, keys("x"), ())
    placement.cached(1, keys("abc"), ())
    placement.cached(2, keys("ab"), ())
    assert placement.choose(ask("a", prompt("abcd")), THREE) == 1
    placement.ended("a")
    placement.cached(1, (), keys("abc")[1:])
    assert placement.choose(ask("b", prompt("abcd")), THREE) == 2


def test_a_prefix_of_another_namespace_is_not_the_same() -> None:
    placement = policy("cache_aware")
    placement.cached(2, keys("aaaa"), ())
    assert placement.choose(ask("a", prompt("aaaa"), namespace="salt"), THREE) == 0


def test_the_ids_of_a_resumed_answer_are_prompt_as_well() -> None:
    placement = policy("cache_aware")
    placement.cached(1, keys("a"), ())
    placement.cached(2, keys("ab"), ())
    resumed = ask("a", prompt("a", 0), received=prompt("b"))
    assert placement.choose(resumed, THREE) == 2


def test_a_hot_prefix_spills_when_waiting_for_it_costs_more_than_computing_it_again() -> None:
    placement = policy("cache_aware")
    placement.cached(0, keys("a" * 8), ())
    places = [placement.choose(ask(str(n), prompt("a" * 8)), (0, 1)) for n in range(9)]
    spilled = places.index(1)
    assert spilled == -(-8 * BLOCK // (REQUEST_TOKENS + 1))
    assert places[spilled + 1] == 0


def test_of_equal_costs_the_replica_with_fewer_requests_is_chosen() -> None:
    placement = policy("cache_aware")
    saved = "a" * (REQUEST_TOKENS // BLOCK)
    placement.cached(0, keys(saved), ())
    placement.choose(ask("runs"), (0,))
    placement.began("runs")
    placement.choose(ask("turn"), (1,))
    placement.ended("turn")
    assert placement.choose(ask("a", prompt(saved)), (0, 1)) == 1


def test_requests_that_run_already_are_no_prompt_to_wait_for() -> None:
    placement = policy("cache_aware")
    placement.cached(0, keys("a" * 8), ())
    placement.choose(ask("long", prompt("bcdefghi")), (0,))
    assert placement.choose(ask("waits", prompt("a" * 8)), (0, 1)) == 1
    placement.ended("waits")
    placement.cached(0, keys("bcdefghi"), ())
    placement.began("long")
    assert placement.choose(ask("goes", prompt("a" * 8)), (0, 1)) == 0


def test_a_prefix_on_its_way_counts_as_cached_where_it_goes() -> None:
    placement = policy("cache_aware")
    for busy in (1, 2):
        placement.choose(ask(f"busy{busy}", prompt("xyzxyzxyz")), (busy,))
    assert placement.choose(ask("first", prompt("abcd")), THREE) == 0
    assert placement.choose(ask("second", prompt("abcd")), THREE) == 0


def test_a_prefix_that_never_arrived_counts_no_more() -> None:
    placement = policy("cache_aware")
    placement.cached(0, keys("x"), ())
    placement.choose(ask("gone", prompt("abcd")), (0,))
    placement.ended("gone")
    placement.cached(1, keys("a"), ())
    assert placement.choose(ask("next", prompt("abcd")), (0, 1)) == 1


def test_a_replica_that_never_tells_is_believed_to_keep_what_was_sent() -> None:
    placement = policy("cache_aware")
    placement.choose(ask("first", prompt("abcd")), (2,))
    placement.began("first")
    placement.ended("first")
    assert placement.choose(ask("second", prompt("abcd")), THREE) == 2
    placement.lost(2)
    assert placement.choose(ask("third", prompt("abcd")), THREE) == 0


def test_the_first_word_of_a_replica_ends_what_was_only_believed() -> None:
    placement = policy("cache_aware")
    placement.choose(ask("first", prompt("abcd")), (2,))
    placement.began("first")
    placement.ended("first")
    placement.cached(2, keys("ab"), ())
    placement.cached(1, keys("abc"), ())
    assert placement.choose(ask("second", prompt("abcd")), THREE) == 1


def test_what_is_believed_of_a_replica_is_bounded() -> None:
    placement = policy("cache_aware")
    placement.choose(ask("old", prompt("abcd")), (2,))
    placement.began("old")
    placement.ended("old")
    long = ask("long", range(SENT_BLOCKS * BLOCK))
    placement.choose(long, (2,))
    placement.began("long")
    placement.ended("long")
    assert placement.choose(ask("new", prompt("abcd")), THREE) == 0


@dataclass
class Live:
    """What the model knows of one request."""

    replica: int
    blocks: str
    missing: int
    begun: bool = False


def prefixes(blocks: str) -> list[str]:
    return [blocks[: n + 1] for n in range(len(blocks))]


class CacheAwareMachine(RuleBasedStateMachine):
    """Random traffic. The model counts everything anew for each choice."""

    blocks = st.text("ab", max_size=4)
    some = st.sets(st.text("ab", min_size=1, max_size=4), max_size=4)
    replicas = st.integers(0, 2)

    @initialize()
    def start(self) -> None:
        self.placement = policy("cache_aware")
        self.live: dict[str, Live] = {}
        self.caches: dict[int, set[str]] = {each: set() for each in THREE}
        self.count, self.last = 0, -1
        for each in THREE:
            self.placement.cached(each, keys("z"), ())

    def cost(self, replica: int, blocks: str, more: int) -> tuple[int, int]:
        """Tokens, and those of the prompt itself."""
        here = [each for each in self.live.values() if each.replica == replica]
        coming = [prefixes(each.blocks) for each in here if not each.begun]
        held = max(
            sum(1 for _ in takewhile(known.__contains__, prefixes(blocks)))
            for known in (self.caches[replica], *coming)
        )
        missing = (len(blocks) - held) * BLOCK + more
        pending = sum(each.missing for each in here if not each.begun)
        return missing + pending + REQUEST_TOKENS * len(here), missing

    @rule(
        blocks=blocks,
        more=st.integers(0, BLOCK - 1),
        free=st.sets(replicas, min_size=1).map(sorted),
    )
    def choose(self, blocks: str, more: int, free: list[int]) -> None:
        if not (blocks or more):
            return
        self.count += 1
        id = str(self.count)
        inflight = {
            each: sum(live.replica == each for live in self.live.values()) for each in THREE
        }
        wanted = min(
            free,
            key=lambda each: (
                self.cost(each, blocks, more)[0],
                inflight[each],
                (each - self.last - 1) % 3,
            ),
        )
        assert self.placement.choose(ask(id, prompt(blocks, more)), free) == wanted
        self.live[id] = Live(wanted, blocks, self.cost(wanted, blocks, more)[1])
        self.last = wanted

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.live)))
        self.placement.began(id)
        self.live[id].begun = True

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.live)))
        self.placement.ended(id)
        del self.live[id]

    @rule(replica=replicas, entered=some, evicted=some)
    def hear(self, replica: int, entered: set[str], evicted: set[str]) -> None:
        self.placement.cached(
            replica, [keys(each)[-1] for each in entered], [keys(each)[-1] for each in evicted]
        )
        self.caches[replica] = (self.caches[replica] | entered) - evicted

    @rule(replica=replicas)
    def lose(self, replica: int) -> None:
        self.placement.lost(replica)
        self.caches[replica] = set()
        self.live = {id: each for id, each in self.live.items() if each.replica != replica}
        self.placement.cached(replica, keys("z"), ())


TestCacheAwareMachine = CacheAwareMachine.TestCase
TestCacheAwareMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
