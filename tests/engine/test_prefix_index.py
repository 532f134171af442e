"""The index of cached prefixes, against a set of keys for each replica."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import given, strategies as st

from engine.prefix_index import PrefixIndex

REPLICAS = st.sampled_from([0, 1, 5, 63])
KEYS = st.lists(st.integers(0, 6), max_size=4)
NEWS = st.tuples(REPLICAS, KEYS, KEYS)
LOSS = st.tuples(REPLICAS)


@given(st.lists(NEWS | LOSS), st.lists(st.integers(0, 6), unique=True))
def test_the_leading_run_that_each_replica_holds_is_found(
    events: list[tuple[int, list[int], list[int]] | tuple[int]], asked: list[int]
) -> None:
    index = PrefixIndex()
    held: dict[int, set[int]] = {replica: set() for replica in (0, 1, 5, 63)}
    for event in events:
        if len(event) == 1:
            index.forget(*event)
            held[event[0]] = set()
        else:
            replica, entered, evicted = event
            index.apply(replica, entered, evicted)
            held[replica] = (held[replica] | {*entered}) - {*evicted}
    runs = {
        replica: len(list(takewhile(keys.__contains__, asked))) for replica, keys in held.items()
    }
    assert index.matched(asked) == {replica: run for replica, run in runs.items() if run}
    assert len(index) == len(set().union(*held.values()))


def test_nothing_is_known_of_a_replica_that_was_forgotten_or_never_told() -> None:
    index = PrefixIndex()
    index.forget(3)
    index.apply(3, (), [1])
    assert index.matched([1]) == {}
    assert index.matched([]) == {}
