"""What a cache tells of its prefixes to those who only hear its events."""

from __future__ import annotations

from hypothesis import given, strategies as st

from backend.cache import Lease, Node, PrefixCache
from backend.prefix_keys import block_tokens, prefix_keys


def must_lease(cache: PrefixCache, tokens: list[int], namespace: str = "") -> Lease:
    lease = cache.lease(namespace, tokens, len(tokens))
    assert lease is not None
    return lease


def finish(cache: PrefixCache, tokens: list[int], namespace: str = "") -> None:
    """Run a sequence of `tokens` from lease to close."""
    lease = must_lease(cache, tokens, namespace)
    cache.commit(lease, tokens, len(tokens))
    cache.close(lease)


def keys_of_paths(cache: PrefixCache) -> set[int]:
    """The keys of all that the tree spells, from the ids alone."""
    keys: set[int] = set()
    stack: list[tuple[Node, tuple[int, ...]]] = [(cache.tree.root, ())]
    while stack:
        node, tokens = stack.pop()
        keys.update(prefix_keys(node.key[0], tokens, block_tokens(cache.page_tokens)))
        stack.extend((child, (*tokens, *child.key[1])) for child in node.children.values())
    return keys


LONG = list(range(192))
OPERATIONS = ["long", "part", "fork", "salt", "evict", "flush", "drain"]


@given(st.lists(st.sampled_from(OPERATIONS)), st.sampled_from([16, 24, 64]))
def test_the_folded_events_are_the_prefixes_of_the_tree(
    operations: list[str], page_tokens: int
) -> None:
    cache = PrefixCache(320 // page_tokens, page_tokens)
    held: set[int] = set()
    for operation in [*operations, "drain"]:
        if operation == "drain":
            entered, evicted = cache.events()
            assert held.isdisjoint(entered)
            assert held.issuperset(evicted)
            held.update(entered)
            held.difference_update(evicted)
            assert held == keys_of_paths(cache)
        elif operation == "flush":
            cache.flush()
        elif operation == "evict":
            cache.close(must_lease(cache, [999] * 200))
        else:
            ids = {"part": LONG[:90], "fork": [*LONG[:64], *[7] * 70]}.get(operation, LONG)
            finish(cache, ids, "salt" if operation == "salt" else "")


def test_a_prefix_is_reported_when_its_block_is_whole_and_once() -> None:
    cache = PrefixCache(20, 16)
    ids = list(range(130))
    first, second = must_lease(cache, ids), must_lease(cache, ids)
    keys = prefix_keys("", ids, 64)
    cache.commit(first, ids, 63)
    assert cache.events() == ([], [])
    cache.commit(first, ids, 64)
    assert cache.events() == (keys[:1], [])
    cache.commit(second, ids, 130)
    cache.commit(first, ids, 130)
    assert cache.events() == (keys[1:], [])
    cache.close(first)
    cache.close(second)
    assert cache.events() == ([], [])


def test_a_prefix_is_reported_gone_when_its_last_page_is_evicted_or_flushed() -> None:
    cache = PrefixCache(8, 16)
    ids = list(range(128))
    finish(cache, ids)
    entered, _ = cache.events()
    must_lease(cache, [7])
    assert cache.events() == ([], entered[1:])
    assert cache.flush() == 7
    assert cache.events() == ([], entered[:1])


def test_what_came_and_went_between_two_questions_is_not_reported() -> None:
    cache = PrefixCache(8, 16)
    finish(cache, list(range(64)))
    cache.flush()
    assert cache.events() == ([], [])
    finish(cache, list(range(64)))
    held = cache.events()
    cache.flush()
    finish(cache, list(range(64)))
    assert cache.events() == ([], [])
    cache.flush()
    assert cache.events() == ([], held[0])


def test_a_prefix_longer_than_its_answer_from_the_tree_is_chained_to_it() -> None:
    cache = PrefixCache(12, 16)
    finish(cache, list(range(70)), "salt")
    cache.events()
    finish(cache, list(range(128)), "salt")
    assert cache.events() == (prefix_keys("salt", range(128), 64)[1:], [])


def test_without_a_prefix_cache_nothing_is_reported() -> None:
    cache = PrefixCache(8, 16, prefix=False)
    finish(cache, list(range(128)))
    assert cache.events() == ([], [])
