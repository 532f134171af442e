"""Which replicas hold which cached prefixes, as far as they have told.

Owned by whoever places requests. Keys are those of `backend/prefix_keys.py`: equal keys mean equal
prefixes. The index may be late, since news take a while; it is never wrong about identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Keys, and for each the replicas that hold it: one int, a bit a replica."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def apply(self, replica: int, entered: Iterable[int], evicted: Iterable[int]) -> None:
        """Take news of a replica's cache."""
        bit = 1 << replica
        for key in entered:
            self._holders[key] = self._holders.get(key, 0) | bit
        for key in evicted:
            self._drop(key, bit)

    def forget(self, replica: int) -> None:
        """A replica holds nothing any more."""
        for key in list(self._holders):
            self._drop(key, 1 << replica)

    def _drop(self, key: int, bit: int) -> None:
        left = self._holders.get(key, 0) & ~bit
        if left:
            self._holders[key] = left
        else:
            self._holders.pop(key, None)

    def matched(self, keys: Sequence[int]) -> dict[int, int]:
        """Of each replica that holds the first of `keys`: how many it holds without a gap."""
        runs: dict[int, int] = {}
        going = self._holders.get(keys[0], 0) if keys else 0
        for length, key in enumerate(keys):
            held = going & self._holders.get(key, 0)
            runs |= dict.fromkeys(_replicas(going & ~held), length)
            going = held
            if not going:
                break
        return runs | dict.fromkeys(_replicas(going), len(keys))


def _replicas(mask: int) -> list[int]:
    return [replica for replica in range(mask.bit_length()) if mask >> replica & 1]
