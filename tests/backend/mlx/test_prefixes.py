"""Which prefixes are kept, against a model that is a list of ids; and the books of all pages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from backend.mlx.pages import Pages
from backend.mlx.prefixes import Match, PrefixStore
from backend.prefix_keys import block_tokens, prefix_keys

PAGE = 4


@dataclass
class Layer:
    """What mlx-lm asks of a layer's cache, and no tensors."""

    positions: int
    cuts: bool = True

    def is_trimmable(self) -> bool:
        return self.cuts

    def trim(self, count: int) -> int:
        assert self.cuts
        self.positions -= count
        return count

    @property
    def state(self) -> list[Any]:
        return []


def keep(
    store: PrefixStore,
    ids: Sequence[int],
    *,
    namespace: str = "",
    wanted: int | None = None,
    room: int = 1000,
    cuts: bool = True,
) -> None:
    """Keep the cache of a sequence of `ids`, all of it unless `wanted` says less."""
    cache = [Layer(len(ids), cuts), Layer(len(ids))]
    store.keep(namespace, ids, cache, len(ids) if wanted is None else wanted, room)


def known(store: PrefixStore, ids: Sequence[int], limit: int = 1000, namespace: str = "") -> int:
    """Positions of `ids` that the store answers, and its copy holds."""
    match = store.match(namespace, ids, limit)
    if match is None:
        return 0
    assert [layer.positions for layer in match.copy()] == [match.positions] * 2
    return match.positions


def ids_from(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_a_prompt_is_answered_in_whole_pages_up_to_its_limit() -> None:
    store = PrefixStore(PAGE, enabled=True)
    keep(store, ids_from(0, 14), wanted=13)
    assert store.pages == 3
    assert known(store, ids_from(0, 20)) == 12
    assert known(store, ids_from(0, 20), limit=11) == 8
    assert known(store, [*ids_from(0, 7), 99]) == 4
    assert known(store, [99, *ids_from(1, 20)]) == 0
    assert known(store, ids_from(0, 20), namespace="other") == 0


def test_a_copy_leaves_the_entry_as_it_was() -> None:
    store = PrefixStore(PAGE, enabled=True)
    keep(store, ids_from(0, 12))
    for _ in range(2):
        assert known(store, ids_from(0, 5)) == 4
        assert known(store, ids_from(0, 12)) == 12


def test_what_brings_nothing_new_is_not_kept_and_what_goes_further_replaces() -> None:
    store = PrefixStore(PAGE, enabled=True)
    keep(store, ids_from(0, 8))
    keep(store, ids_from(0, 8))
    keep(store, ids_from(0, 5))
    assert store.pages == 2
    keep(store, ids_from(0, 16))
    assert store.pages == 4
    keep(store, [*ids_from(0, 8), *ids_from(50, 8)])
    assert store.pages == 8  # another way: a cache of its own


def test_the_least_recently_used_goes_first() -> None:
    store = PrefixStore(PAGE, enabled=True)
    for start in (0, 100, 200):
        keep(store, ids_from(start, 8))
    known(store, ids_from(0, 9))
    assert store.shrink(4) == 2
    assert [known(store, ids_from(start, 9)) for start in (0, 100, 200)] == [8, 0, 8]
    keep(store, ids_from(300, 8), room=4)
    assert [known(store, ids_from(start, 9)) for start in (0, 200, 300)] == [0, 8, 8]
    keep(store, ids_from(400, 24), room=4)
    assert known(store, ids_from(400, 24)) == 0
    assert store.pages == 4


def test_a_cache_that_cannot_be_cut_answers_what_begins_with_all_of_it() -> None:
    store = PrefixStore(PAGE, enabled=True)
    keep(store, ids_from(0, 14), wanted=13, cuts=False)
    assert store.pages == 4
    assert known(store, ids_from(0, 20)) == 14
    assert known(store, ids_from(0, 14), limit=13) == 0
    assert known(store, ids_from(0, 13)) == 0
    keep(store, ids_from(0, 14), cuts=False)
    assert store.pages == 4  # it is there already
    keep(store, ids_from(0, 9))
    assert known(store, ids_from(0, 13)) == 8  # the longest that may be had
    assert known(store, ids_from(0, 20)) == 14


def test_nothing_is_kept_where_that_is_switched_off() -> None:
    store = PrefixStore(PAGE, enabled=False)
    keep(store, ids_from(0, 12))
    assert (store.pages, known(store, ids_from(0, 12))) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules_find_the_longest_prefix_and_tell_the_front_what_they_hold(
    seed: int,
) -> None:
    rng = random.Random(seed)
    store = PrefixStore(PAGE, enabled=True)
    kept: list[list[int]] = []  # the model, least recently used first: pages of ids
    told: set[int] = set()
    block = block_tokens(PAGE)
    for _ in range(60):
        ids = [rng.randrange(2) for _ in range(PAGE)] * rng.randint(1, 3)
        ids += [rng.randrange(2)] * rng.randint(0, 160)
        if rng.random() < 0.5:
            limit = rng.randint(0, len(ids))
            assert known(store, ids, limit) == max(_shared(ids[:limit], kept), default=0)
            used = store.match("", ids, limit)
            kept.sort(key=lambda each: used is not None and tuple(each) == used.entry.ids)
        else:
            keep(store, ids, room=90)
            _model_keep(kept, ids[: len(ids) // PAGE * PAGE], room=90 * PAGE)
        entered, evicted = store.events()
        assert not set(entered) & set(evicted)
        told = (told | set(entered)) - set(evicted)
        assert told == {key for each in kept for key in prefix_keys("", each, block)}
        assert store.pages == sum(map(len, kept)) // PAGE


def _shared(ids: list[int], kept: list[list[int]]) -> list[int]:
    """How many whole pages of ids each has in common with `ids`."""
    pages = range(0, len(ids) - PAGE + 1, PAGE)
    return [
        sum(PAGE for start in pages if ids[: start + PAGE] == each[: start + PAGE]) for each in kept
    ]


def _model_keep(kept: list[list[int]], ids: list[int], room: int) -> None:
    if not ids or any(each[: len(ids)] == ids for each in kept):
        return
    kept[:] = [each for each in kept if ids[: len(each)] != each]
    while sum(map(len, kept)) + len(ids) > room:
        del kept[0]
    kept.append(ids)


def test_rows_are_as_long_as_the_longest_of_them() -> None:
    pages = Pages(20, PrefixStore(PAGE, enabled=True))
    assert pages.reserve("a", 3)
    assert pages.reserve("b", 5)
    assert (pages.leased, pages.free) == (10, 10)
    assert not pages.reserve("c", 7)  # three rows of seven
    assert pages.reserve("c", 6)
    assert (pages.leased, pages.free) == (18, 2)
    pages.release("c")
    assert pages.leased == 10
    pages.release("b")
    assert pages.leased == 3


def test_prefixes_make_room_for_who_runs_and_no_more_than_that() -> None:
    pages = Pages(10, PrefixStore(PAGE, enabled=True))
    for start in (0, 100):
        pages.keep("", ids_from(start, 16), [Layer(16), Layer(16)], 16)
    assert (pages.cached, pages.free) == (8, 2)
    assert not pages.reserve("a", 11)
    assert pages.cached == 8
    assert pages.reserve("a", 3)
    assert (pages.leased, pages.cached, pages.free) == (3, 4, 3)
    pages.keep("", ids_from(200, 32), [Layer(32), Layer(32)], 32)
    assert pages.cached == 4  # eight pages are not there
    assert pages.match("", ids_from(100, 17), 16) is not None
    assert pages.flush() == 4
    assert (pages.leased, pages.cached, pages.free) == (3, 0, 7)


def test_a_match_outlives_its_entry() -> None:
    store = PrefixStore(PAGE, enabled=True)
    keep(store, ids_from(0, 12))
    match = store.match("", ids_from(0, 9), 8)
    assert isinstance(match, Match)
    store.shrink(0)
    assert [layer.positions for layer in match.copy()] == [8, 8]
