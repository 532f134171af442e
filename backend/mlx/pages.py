"""Who holds how much of the KV budget, in pages: sequences that run, and prefixes that are kept.

Owned by the backend. A running sequence reserves all that it may come to need, as mlx-lm cannot
make it yield. Its rows are one array, as long for each as for the longest: so the pages leased are
the rows times the largest reservation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from backend.mlx.library import PromptCache
from backend.mlx.prefixes import Match, PrefixStore


class Pages:
    """The books of one budget. leased + cached + free = total, always."""

    def __init__(self, total: int, prefixes: PrefixStore) -> None:
        self.total = total
        self._prefixes = prefixes
        self._reserved: dict[Hashable, int] = {}  # pages, by who holds them

    @property
    def leased(self) -> int:
        """Pages of running sequences."""
        return len(self._reserved) * max(self._reserved.values(), default=0)

    @property
    def cached(self) -> int:
        """Pages of prefixes that are kept, given up when needed."""
        return self._prefixes.pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self.total - self.leased - self.cached

    def reserve(self, owner: Hashable, pages: int) -> bool:
        """Hold `pages` for `owner`, kept prefixes making room. False, and nothing changed, when
        they are not to be had.
        """
        largest = max(pages, *self._reserved.values(), 0)
        needed = (len(self._reserved) + 1) * largest
        if needed > self.total:
            return False
        self._prefixes.shrink(self.total - needed)
        self._reserved[owner] = pages
        return True

    def release(self, owner: Hashable) -> None:
        """Give back what `owner` holds."""
        del self._reserved[owner]

    def match(self, namespace: str, ids: Sequence[int], limit: int) -> Match | None:
        """The longest kept prefix of `ids`, `limit` positions at most."""
        return self._prefixes.match(namespace, ids, limit)

    def keep(self, namespace: str, ids: Sequence[int], cache: PromptCache, wanted: int) -> None:
        """Keep the first `wanted` positions of `cache`, which holds `ids`, where there is room."""
        self._prefixes.keep(namespace, ids, cache, wanted, self.total - self.leased)

    @property
    def keeps(self) -> bool:
        """Whether prefixes are kept at all."""
        return self._prefixes.enabled

    def flush(self) -> int:
        """Give up every prefix. Returns the pages freed."""
        return self._prefixes.shrink(0)

    def events(self) -> tuple[list[int], list[int]]:
        """Keys of the prefixes that came and that went since the last call."""
        return self._prefixes.events()
