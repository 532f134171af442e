"""What is kept of responses: for whom, how much, and which goes first."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given, settings, strategies as st

from api.response_store import ResponseStore, StoredResponse


def message(id: str, text: str = "") -> dict[str, Any]:
    return {"id": id, "type": "message", "text": text}


def response(id: str, text: str = "") -> StoredResponse:
    return StoredResponse({"id": id, "output": [message(f"{id}-out", text)]}, (), [message(id)])


def size_of(stored: StoredResponse) -> int:
    return len(orjson.dumps({"response": stored.response, "input": stored.input}))


def test_another_owners_response_is_not_there() -> None:
    store = ResponseStore()
    store.keep("me", response("a"))
    assert store.get("me", "a") is not None
    assert store.get("you", "a") is None
    assert not store.delete("you", "a")
    assert store.items("you", {"a"}) == {}
    assert store.items("me", {"a", "a-out", "b"}).keys() == {"a", "a-out"}


def test_the_least_recently_used_goes_when_there_are_too_many() -> None:
    store = ResponseStore(most=2)
    store.keep("me", response("a"))
    store.keep("me", response("b"))
    store.get("me", "a")
    store.keep("you", response("c"))
    assert [store.get("me", "a") is None, store.get("me", "b") is None] == [False, True]
    assert len(store) == 2


def test_what_exceeds_all_bytes_is_not_kept_and_moves_nobody_out() -> None:
    store = ResponseStore(most_bytes=300)
    store.keep("me", response("a"))
    store.keep("me", response("b", "x" * 300))
    assert store.get("me", "b") is None
    assert store.get("me", "a") is not None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("kgd"), st.integers(0, 5), st.integers(0, 200))))
def test_the_bounds_hold_and_the_bytes_are_those_of_what_is_there(
    events: list[tuple[str, int, int]],
) -> None:
    store = ResponseStore(most=4, most_bytes=900)
    kept: dict[str, StoredResponse] = {}  # the last used is the last
    for number, (what, which, length) in enumerate(events):
        id = f"{which}"
        if what == "k":
            id = f"new-{number}"
            kept[id] = response(id, "x" * length)
            store.keep("me", kept[id])
        elif what == "g" and store.get("me", id) is not None:
            kept[id] = kept.pop(id)
        elif what == "d":
            assert store.delete("me", id) == (kept.pop(id, None) is not None)
        while len(kept) > 4 or sum(map(size_of, kept.values())) > 900:
            del kept[next(iter(kept))]
        assert len(store) == len(kept)
        assert store.bytes == sum(map(size_of, kept.values()))
    assert all(store.get("me", id) is each for id, each in kept.items())
