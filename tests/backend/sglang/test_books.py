"""Rows and pages as they can be known from outside: every page is accounted for, whatever comes."""

from __future__ import annotations

import random

import pytest

from backend.interface import BackendSpec
from backend.sglang.books import Books

PAGES, PAGE, ROWS = 12, 4, 3
SPEC = BackendSpec(
    name="sglang", model="m", folder=None, vocabulary=100, max_model_len=1000, stop_ids=(),
    page_tokens=PAGE, pages=PAGES, max_running=ROWS, max_step_tokens=64, depth=1, device="cuda",
    dtype="bfloat16", attention="fa3",
)  # fmt: skip


@pytest.fixture(params=[True, False], ids=["prefix", "no prefix"])
def books(request: pytest.FixtureRequest) -> Books:
    return Books(SPEC, request.param)


@pytest.mark.parametrize("seed", range(20))
def test_every_page_is_accounted_for_whatever_sglang_does(books: Books, seed: int) -> None:
    """SGLang may run what our books have no page for: they are about to be wrong, never broken."""
    rng = random.Random(seed)
    live: dict[str, int] = {}
    for number in range(120):
        if rng.random() < 0.3:
            live[f"{number}"] = 0
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 30))]
            books.enter(f"{number}", rng.choice(["", "salt"]), prompt)
        elif live and rng.random() < 0.8:
            id = rng.choice(list(live)[: ROWS + 1])
            books.take(id, [rng.randrange(3) for _ in range(rng.randint(1, 5))])
            live[id] += 1
        elif live:
            id = rng.choice(list(live))
            del live[id]
            books.leave(id)
        books._cache.check()
        load = books.load(len(live))
        assert load.pages_free + load.pages_cached + load.pages_leased == load.pages_total == PAGES
        assert load.running + load.waiting == len(live)
        assert load.running >= sum(1 for told in live.values() if told), "who was heard of runs"
    for id in live:
        books.leave(id)
    books.flush()
    assert books.load(0).pages_free == PAGES


def test_requests_begin_in_the_order_they_came_as_rows_and_pages_allow(books: Books) -> None:
    for id, count in (("a", 20), ("b", 20), ("c", 20), ("d", 4)):  # five pages, or one
        books.enter(id, id, list(range(count)))
    assert [books.runs(id) for id in "abcd"] == [True, True, False, False]
    books.leave("a")
    assert [books.runs(id) for id in "bcd"] == [True, True, True]


def test_what_was_computed_stays_for_others_in_whole_pages() -> None:
    books = Books(SPEC, prefix=True)
    books.enter("a", "", [1, 2, 3, 4, 5, 6])
    for token in (7, 8, 9, 1):
        books.take("a", [token])
    books.leave("a")
    load = books.load(0)
    assert (load.pages_cached, load.pages_leased) == (2, 0)  # the last token was never an input
    assert books.flush() == 2
