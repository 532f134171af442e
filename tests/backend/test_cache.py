"""The books of the page cache, against a model that keeps sets of prefixes and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from backend.cache import Lease, Node, PagePool, PrefixCache
from backend.prefix_keys import block_tokens, prefix_keys

Prefix = tuple[str, tuple[int, ...]]  # a namespace, and the ids from position 0 to a page's end


def finish(cache: PrefixCache, tokens: list[int], namespace: str = "") -> list[int]:
    """Run a sequence of `tokens` from lease to close. Returns its pages."""
    lease = cache.lease(namespace, tokens, len(tokens))
    assert lease is not None
    cache.commit(lease, tokens, len(tokens))
    cache.close(lease)
    cache.check()
    return lease.pages


def must_lease(cache: PrefixCache, tokens: list[int], limit: int, namespace: str = "") -> Lease:
    lease = cache.lease(namespace, tokens, limit)
    cache.check()
    assert lease is not None
    return lease


def test_a_finished_prefix_is_found_again_in_whole_pages() -> None:
    cache = PrefixCache(8, 2)
    pages = finish(cache, [1, 2, 3, 4, 5])
    lease = must_lease(cache, [1, 2, 3, 4, 9], limit=4)
    assert lease.shared == 4
    assert lease.pages[:2] == pages[:2]


def test_a_match_answers_no_more_than_its_limit() -> None:
    cache = PrefixCache(8, 2)
    finish(cache, [1, 2, 3, 4])
    assert cache.match("", [1, 2, 3, 4], 4) == 4
    assert cache.match("", [1, 2, 3, 4], 3) == 2
    assert cache.match("", [1, 2, 3, 4], 1) == 0


def test_the_same_page_of_tokens_behind_another_prefix_is_another_page() -> None:
    cache = PrefixCache(8, 2)
    finish(cache, [1, 1, 7, 7])
    assert cache.match("", [2, 2, 7, 7], 4) == 0


def test_a_prefix_is_shared_while_its_first_owner_still_runs() -> None:
    cache = PrefixCache(4, 2)
    first = must_lease(cache, [1, 2, 3], 2)
    cache.commit(first, [1, 2, 3], 2)
    second = must_lease(cache, [1, 2, 4], 2)
    assert second.pages[0] == first.pages[0]
    assert cache.leased == 3
    cache.close(first)
    cache.check()
    assert cache.leased == 2


def test_namespaces_share_nothing() -> None:
    cache = PrefixCache(8, 2)
    finish(cache, [1, 2, 3, 4], "a")
    assert cache.match("b", [1, 2, 3, 4], 4) == 0
    assert cache.match("a", [1, 2, 3, 4], 4) == 4


def test_without_a_prefix_cache_every_page_comes_home_on_close() -> None:
    cache = PrefixCache(4, 2, prefix=False)
    finish(cache, [1, 2, 3, 4])
    assert cache.pool.free == 4
    assert cache.match("", [1, 2, 3, 4], 4) == 0


def test_eviction_takes_the_least_recently_used_prefix_from_its_end() -> None:
    cache = PrefixCache(4, 1)
    finish(cache, [1, 2])
    finish(cache, [3, 4])
    finish(cache, [1, 2])  # used again: [3, 4] is now the older
    must_lease(cache, [9], 0)
    assert cache.match("", [3, 4], 2) == 1
    assert cache.match("", [1, 2], 2) == 2
    must_lease(cache, [8], 0)
    must_lease(cache, [7], 0)
    assert cache.match("", [3], 1) == 0
    assert cache.match("", [1, 2], 2) == 1


def test_a_page_in_use_is_never_evicted() -> None:
    cache = PrefixCache(3, 1)
    first = must_lease(cache, [1, 2], 0)
    cache.commit(first, [1, 2], 2)
    assert cache.flush() == 0
    assert cache.lease("", [8, 9], 0) is None
    assert cache.match("", [1, 2], 2) == 2


def test_a_lease_that_would_leave_too_little_spare_changes_nothing() -> None:
    cache = PrefixCache(4, 2)
    finish(cache, [1, 2])
    assert cache.lease("", [1, 2, 3], 2, spare=3) is None
    cache.check()
    assert cache.available == 4
    assert cache.lease("", [1, 2, 3], 2, spare=2) is not None


def test_growing_beyond_the_pages_changes_nothing() -> None:
    cache = PrefixCache(2, 2)
    lease = must_lease(cache, [1], 0)
    assert cache.grow(lease, 2)
    assert len(lease.pages) == 1
    assert cache.grow(lease, 4)
    assert not cache.grow(lease, 5)
    cache.check()
    assert len(lease.pages) == 2


def test_a_duplicate_stays_with_its_owner_until_close() -> None:
    cache = PrefixCache(4, 2)
    first, second = must_lease(cache, [1, 2], 0), must_lease(cache, [1, 2], 0)
    cache.commit(first, [1, 2], 2)
    cache.commit(second, [1, 2], 2)
    cache.check()
    assert second.pages != first.pages
    assert cache.available == 2
    cache.close(second)
    cache.check()
    assert cache.pool.free == 3
    assert cache.match("", [1, 2], 2) == 2


def test_a_lease_closes_exactly_once() -> None:
    cache = PrefixCache(2, 2)
    lease = must_lease(cache, [1], 0)
    cache.close(lease)
    with pytest.raises(ValueError, match="closed"):
        cache.close(lease)
    cache.check()


def test_flushing_gives_up_what_is_not_in_use_and_says_how_much() -> None:
    cache = PrefixCache(6, 1)
    finish(cache, [1, 2, 3])
    held = must_lease(cache, [1, 9], 1)
    assert cache.flush() == 2
    cache.check()
    assert cache.match("", [1, 2, 3], 3) == 1
    cache.close(held)
    assert cache.flush() == 1
    assert cache.pool.free == 6


def test_the_books_notice_a_page_that_is_lost_and_one_that_is_held_twice() -> None:
    lost, twice = PrefixCache(3, 1), PrefixCache(3, 1)
    lost.pool.take(1)
    with pytest.raises(AssertionError, match="lost or held twice"):
        lost.check()
    must_lease(twice, [1], 0).pages.append(2)
    with pytest.raises(AssertionError, match="lost or held twice"):
        twice.check()


def test_the_pool_hands_out_only_what_it_has() -> None:
    pool = PagePool(2)
    pages = pool.take(2)
    with pytest.raises(ValueError, match="1 pages wanted, 0 free"):
        pool.take(1)
    pool.give_back(pages)
    assert pool.free == 2


@dataclass(eq=False)
class Holder:
    """What the model knows of one lease."""

    lease: Lease
    namespace: str
    tokens: list[int]
    entered: int  # pages that stand in the tree
    own: int  # pages that do not, duplicates included

    def prefix(self, pages: int, page_tokens: int) -> Prefix:
        return self.namespace, tuple(self.tokens[: pages * page_tokens])


class CacheMachine(RuleBasedStateMachine):
    """Random use of a cache. The model: a dict of prefixes with the time of their last use."""

    holders = Bundle("holders")
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)
    folded: set[int]  # what somebody knows who only heard the events
    namespaces = st.sampled_from(["", "salt"])

    @initialize(pages=st.integers(3, 9), page_tokens=st.integers(1, 3), prefix=st.booleans())
    def start(self, pages: int, page_tokens: int, prefix: bool) -> None:
        with patch("backend.prefix_keys.BLOCK_TOKENS", 2):  # so that short sequences fill blocks
            self.cache = PrefixCache(pages, page_tokens, prefix)
            self.block = block_tokens(page_tokens)
        self.folded = set()
        self.size, self.page_tokens, self.prefix = pages, page_tokens, prefix
        self.kept: dict[Prefix, int] = {}
        self.live: list[Holder] = []
        self.written: dict[int, Prefix | Holder] = {}  # what a page holds, or who may write it
        self.clock = 0

    def pinned(self) -> set[Prefix]:
        return {
            holder.prefix(pages, self.page_tokens)
            for holder in self.live
            for pages in range(1, holder.entered + 1)
        }

    def available(self) -> int:
        return self.size - len(self.pinned()) - sum(holder.own for holder in self.live)

    def use(self, namespace: str, tokens: list[int], first: int, last: int) -> None:
        """Pages first .. last - 1 of `tokens` are used now."""
        self.clock += 1
        for pages in range(first + 1, last + 1):
            self.kept[namespace, tuple(tokens[: pages * self.page_tokens])] = self.clock

    def make_room(self, count: int) -> None:
        """Evict until `count` pages are free."""
        own = sum(holder.own for holder in self.live)
        while self.size - own - len(self.kept) < count:
            leaves = [
                prefix
                for prefix in self.kept.keys() - self.pinned()
                if not any(
                    other != prefix
                    and other[0] == prefix[0]
                    and other[1][: len(prefix[1])] == prefix[1]
                    for other in self.kept
                )
            ]
            del self.kept[min(leaves, key=self.kept.__getitem__)]

    def matched(self, namespace: str, tokens: list[int], limit: int) -> int:
        pages = 0
        while (pages + 1) * self.page_tokens <= min(limit, len(tokens)) and (
            (namespace, tuple(tokens[: (pages + 1) * self.page_tokens])) in self.kept
        ):
            pages += 1
        return pages

    @rule(namespace=namespaces, tokens=tokens, limit=st.integers(0, 9))
    def match(self, namespace: str, tokens: list[int], limit: int) -> None:
        found = self.cache.match(namespace, tokens, limit)
        assert found == self.matched(namespace, tokens, limit) * self.page_tokens

    @rule(
        target=holders,
        namespace=namespaces,
        tokens=tokens,
        limit=st.integers(0, 9),
        spare=st.sampled_from([0, 0, 0, 1, 3]),
    )
    def lease(self, namespace: str, tokens: list[int], limit: int, spare: int) -> Holder | None:
        shared = self.matched(namespace, tokens, limit)
        missing = -(-len(tokens) // self.page_tokens) - shared
        lease = self.cache.lease(namespace, tokens, limit, spare)
        self.use(namespace, tokens, 0, shared)
        holder = Holder(lease or Lease(namespace, [], 0, []), namespace, tokens, shared, 0)
        self.live.append(holder)  # pins what is shared
        if missing + spare > self.available():
            assert lease is None
            self.live.remove(holder)
            return None
        assert lease is not None
        assert lease.shared == shared * self.page_tokens
        self.make_room(missing)
        holder.own = missing
        self.written.update(dict.fromkeys(lease.pages[shared:], holder))
        return holder

    @rule(holder=holders, more=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def grow(self, holder: Holder | None, more: list[int]) -> None:
        if holder not in self.live:
            return
        held = len(holder.lease.pages)
        missing = max(0, -(-(len(holder.tokens) + len(more)) // self.page_tokens) - held)
        fits = missing <= self.available()
        assert self.cache.grow(holder.lease, len(holder.tokens) + len(more)) == fits
        if fits:
            self.make_room(missing)
            holder.own += missing
            holder.tokens = holder.tokens + more
            self.written.update(dict.fromkeys(holder.lease.pages[held:], holder))
        assert len(holder.lease.pages) == held + missing * fits

    @rule(holder=holders, part=st.floats(0, 1))
    def commit(self, holder: Holder | None, part: float) -> None:
        if holder not in self.live:
            return
        floor = holder.entered * self.page_tokens
        settled = floor + round(part * (len(holder.tokens) - floor))
        self.cache.commit(holder.lease, holder.tokens, settled)
        entered = settled // self.page_tokens if self.prefix else 0
        for index in range(holder.entered, entered):
            prefix = holder.prefix(index + 1, self.page_tokens)
            self.written[holder.lease.pages[index]] = prefix
            holder.own -= prefix not in self.kept  # the tree's now; else a duplicate
        if entered > holder.entered:
            self.use(holder.namespace, holder.tokens, holder.entered, entered)
            holder.entered = entered

    @rule(holder=holders)
    def close(self, holder: Holder | None) -> None:
        if holder not in self.live:
            return
        self.live.remove(holder)
        self.cache.close(holder.lease)
        self.use(holder.namespace, holder.tokens, 0, holder.entered)
        with pytest.raises(ValueError, match="closed"):
            self.cache.close(holder.lease)

    @rule()
    def flush(self) -> None:
        pinned = self.pinned()
        assert self.cache.flush() == len(self.kept) - len(pinned)
        self.kept = {prefix: used for prefix, used in self.kept.items() if prefix in pinned}

    @rule()
    def drain(self) -> None:
        entered, evicted = self.cache.events()
        assert len({*entered, *evicted}) == len(entered) + len(evicted)
        assert not self.folded & {*entered}
        assert self.folded >= {*evicted}
        self.folded = (self.folded | {*entered}) - {*evicted}
        assert self.folded == {
            prefix_keys(namespace, tokens, self.block)[-1]
            for namespace, tokens in self.kept
            if len(tokens) % self.block == 0
        }

    @invariant()
    def the_books_agree(self) -> None:
        self.cache.check()
        assert self.cache.available == self.available()
        assert self.cache.leased == self.size - self.available()
        assert self.cache.tree.pages == len(self.kept)

    @invariant()
    def every_page_holds_what_its_owner_thinks(self) -> None:
        for holder in self.live:
            for index, page in enumerate(holder.lease.pages):
                inside = index < holder.entered
                wanted = holder.prefix(index + 1, self.page_tokens) if inside else holder
                assert self.written[page] == wanted

    @invariant()
    def the_tree_holds_what_was_used_last(self) -> None:
        spelled: dict[Prefix, int] = {}
        stack: list[tuple[Node, tuple[int, ...]]] = [
            (node, ()) for node in self.cache.tree.root.children.values()
        ]
        while stack:
            node, before = stack.pop()
            tokens = (*before, *node.key[1])
            spelled[node.key[0], tokens] = node.page
            stack.extend((child, tokens) for child in node.children.values())
        assert spelled.keys() == self.kept.keys()
        for prefix, page in spelled.items():
            assert self.written[page] == prefix


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
