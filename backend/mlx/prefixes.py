"""Prefixes that were computed before: prompt caches of answers that ended, for those to come.

Owned by `Pages`. An entry is the cache of one sequence, cut to whole pages; a prompt gets a copy of
the entry that it shares most pages with, cut to these. A cache that cannot be cut (states of
layers without attention, a full sliding window) is kept whole, and answers only prompts that begin
with all of it. The least recently used entry goes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from backend.cache import PrefixEvents
from backend.mlx.library import PromptCache, can_cut, copied, cut, start_computing
from backend.prefix_keys import block_tokens, prefix_keys


@dataclass(eq=False, slots=True)
class Entry:
    """A cache, and the ids that it holds."""

    namespace: str
    ids: tuple[int, ...]
    cache: PromptCache
    pages: int
    page_keys: list[int]  # names of all its prefixes of whole pages that may be answered from it
    block_keys: list[int] = field(default_factory=list)  # what the front calls it


@dataclass(frozen=True, eq=False, slots=True)
class Match:
    """The longest known prefix of a prompt."""

    entry: Entry
    positions: int

    def copy(self) -> PromptCache:
        """A cache of these positions, for a sequence to go on from."""
        found = copied(self.entry.cache)
        cut(found, len(self.entry.ids) - self.positions)
        return found


class PrefixStore:
    """Entries by what they begin with. `enabled` False keeps nothing."""

    def __init__(self, page_tokens: int, enabled: bool) -> None:
        self.page_tokens = page_tokens
        self.pages = 0  # of all entries
        self.enabled = enabled
        self._entries: dict[Entry, None] = {}  # least recently used first
        self._holders: dict[int, dict[Entry, None]] = {}  # by page key
        self._named: Counter[int] = Counter()  # entries that have a block key
        self._events = PrefixEvents()

    def match(self, namespace: str, ids: Sequence[int], limit: int) -> Match | None:
        """The longest known prefix of `ids`, `limit` positions at most."""
        best = self._match_pages(namespace, ids[:limit])
        for entry in self._entries:
            length = len(entry.ids)
            longer = not entry.page_keys and (0 if best is None else best.positions) < length
            if longer and length <= limit and _begins(entry, namespace, ids, length):
                best = Match(entry, length)
        if best is not None:
            self._use(best.entry)
        return best

    def _match_pages(self, namespace: str, ids: Sequence[int]) -> Match | None:
        known = 0
        found: dict[Entry, None] = {}
        for key in prefix_keys(namespace, ids, self.page_tokens):
            holders = self._holders.get(key)
            if holders is None:
                break
            found, known = holders, known + self.page_tokens
        for entry in found:
            if _begins(entry, namespace, ids, known):  # else a key stands for two prefixes
                return Match(entry, known)
        return None

    def _use(self, entry: Entry) -> None:
        self._entries[entry] = self._entries.pop(entry)

    def keep(
        self, namespace: str, ids: Sequence[int], cache: PromptCache, wanted: int, room: int
    ) -> None:
        """Keep `cache`, which holds `ids` and is ours from now on, as far as the first `wanted`
        positions where it can be cut, and make `room` for it: pages of all entries. Entries that
        it begins with are dropped; where it brings nothing new, it is.
        """
        if not self.enabled:
            return
        entry = self._entry(namespace, ids, cache, wanted)
        if entry is None or entry.pages > room:
            return
        for key in entry.page_keys:
            for other in list(self._holders.get(key, ())):
                if other.page_keys[-1] == key:
                    self._drop(other)
        self.shrink(room - entry.pages)
        start_computing(entry.cache)
        self._add(entry)

    def _entry(
        self, namespace: str, ids: Sequence[int], cache: PromptCache, wanted: int
    ) -> Entry | None:
        """What is to be kept of a cache; None: nothing."""
        cuts = can_cut(cache)
        length = wanted // self.page_tokens * self.page_tokens if cuts else len(ids)
        kept = tuple(ids[:length])
        page_keys = prefix_keys(namespace, kept, self.page_tokens) if cuts else []
        if not kept or self._has(namespace, kept, page_keys):
            return None
        cut(cache, len(ids) - length)
        return Entry(
            namespace,
            kept,
            cache,
            -(-length // self.page_tokens),
            page_keys,
            prefix_keys(namespace, kept, block_tokens(self.page_tokens)),
        )

    def _has(self, namespace: str, ids: tuple[int, ...], page_keys: Sequence[int]) -> bool:
        """Whether an entry answers all that one of `ids` could."""
        if page_keys:
            return page_keys[-1] in self._holders
        return any((each.namespace, each.ids) == (namespace, ids) for each in self._entries)

    def _add(self, entry: Entry) -> None:
        self._entries[entry] = None
        self.pages += entry.pages
        for key in entry.page_keys:
            self._holders.setdefault(key, {})[entry] = None
        for key in entry.block_keys:
            self._named[key] += 1
            if self._named[key] == 1:
                self._events.enter(key)

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry]
        self.pages -= entry.pages
        for key in entry.page_keys:
            del self._holders[key][entry]
            if not self._holders[key]:
                del self._holders[key]
        for key in entry.block_keys:
            self._named[key] -= 1
            if not self._named[key]:
                del self._named[key]
                self._events.leave(key)

    def shrink(self, pages: int) -> int:
        """Drop entries until they take `pages` at most. Returns the pages freed."""
        before = self.pages
        while self.pages > pages:
            self._drop(next(iter(self._entries)))
        return before - self.pages

    def events(self) -> tuple[list[int], list[int]]:
        """Keys (`backend/prefix_keys.py`) of the prefixes that came and that went since the last
        call.
        """
        return self._events.drain()


def _begins(entry: Entry, namespace: str, ids: Sequence[int], count: int) -> bool:
    """Whether both have the same first `count` ids."""
    return entry.namespace == namespace and entry.ids[:count] == tuple(ids[:count])
