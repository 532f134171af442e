"""What runs and what it holds, as far as it can be known from outside: SGLang does not tell.

Rows and pages by SGLang's rules: requests start in the order they came, as rows and pages allow;
whole pages of what was computed stay for others, the least recently used go first. Its own books
may differ by a page or a moment. What a request found in the cache it tells itself, and that alone
is reported with an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backend.cache import Lease, PrefixCache
from backend.interface import BackendSpec, Load


@dataclass(eq=False, slots=True)
class Row:
    """A request that SGLang has."""

    namespace: str
    ids: list[int]  # known so far: prompt and answer
    running: bool = False
    lease: Lease | None = None  # None: it waits, or runs where our books have no page for it
    booked: int = 0  # positions up to which there is nothing to do: the end of a page


class Books:
    """Owned by the backend, one thread."""

    def __init__(self, spec: BackendSpec, prefix: bool) -> None:
        self._most = spec.max_running
        self._page_tokens = spec.page_tokens
        self._cache = PrefixCache(spec.pages, spec.page_tokens, prefix)
        self._rows: dict[str, Row] = {}  # in the order they came
        self._running = 0
        self.preemptions = 0
        self.steps = 0

    def enter(self, id: str, namespace: str, ids: Sequence[int]) -> None:
        """SGLang has a request."""
        self._rows[id] = Row(namespace, list(ids))
        self._start_waiting()

    def ids(self, id: str) -> list[int]:
        """What is known of a request: its prompt and its answer. Not for keeping."""
        return self._rows[id].ids

    def __contains__(self, id: str) -> bool:
        return id in self._rows

    def runs(self, id: str) -> bool:
        """Whether a request has begun, as far as can be known."""
        return id in self._rows and self._rows[id].running

    def take(self, id: str, tokens: Sequence[int]) -> None:
        """Tokens of an answer came: all before the last of them was computed."""
        row = self._rows[id]
        if not row.running:  # it found pages that our books do not have
            self._start(row)
        row.ids += tokens
        count = len(row.ids)
        if count > row.booked:
            row.booked = -(-count // self._page_tokens) * self._page_tokens
            if row.lease is not None and self._cache.grow(row.lease, count):
                self._cache.commit(row.lease, row.ids, count - 1)

    def leave(self, id: str) -> None:
        """A request has ended."""
        row = self._rows.pop(id)
        self._running -= row.running
        if row.lease is not None:
            held = len(row.lease.pages) * self._page_tokens
            self._cache.commit(row.lease, row.ids, min(held, len(row.ids) - 1))
            self._cache.close(row.lease)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Let those begin that have a row and pages, in order."""
        for row in self._rows.values():
            if self._running >= self._most:
                return
            if not row.running:
                row.lease = self._lease(row)
                if row.lease is None:
                    return
                self._start(row)

    def _start(self, row: Row) -> None:
        row.running = True
        self._running += 1
        row.lease = row.lease or self._lease(row)

    def _lease(self, row: Row) -> Lease | None:
        return self._cache.lease(row.namespace, row.ids, len(row.ids) - 1)

    def events(self) -> tuple[list[int], list[int]]:
        """Prefixes that entered and left, by `backend/prefix_keys.py`."""
        return self._cache.events()

    def flush(self) -> int:
        """SGLang's cache is empty. Returns the pages freed."""
        return self._cache.flush()

    def load(self, answers: int) -> Load:
        """Of so many answers: those that have no row here wait."""
        cache = self._cache
        return Load(
            running=self._running,
            waiting=answers - self._running,
            pages_total=cache.pool.size,
            pages_free=cache.pool.free,
            pages_cached=cache.tree.pages - cache.tree.pinned,
            pages_leased=cache.leased,
            preemptions=self.preemptions,
            steps=self.steps,
        )
