"""Which replica answers a request: the policies behind SCHEDULER_MODE, and the books they share.

Owned by the pool, on its event loop. The pool asks when a request leaves its queue, proposing only
replicas that are free, and tells what became of it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from backend.interface import Submission
from backend.prefix_keys import block_tokens, prefix_keys
from engine.prefix_index import PrefixIndex

# What a request in flight costs the next one on its replica, in tokens of prefill. In simulation
# (`tests/engine/fleet_simulation.py`) 64 to 256 do equally well. With less, prefixes gather where
# answers run already, which lengthens the tail; from 512 on they are scattered, and are hit less.
REQUEST_TOKENS = 128

SENT_BLOCKS = 1 << 14  # remembered at most of a replica that never tells what it caches


@dataclass(frozen=True, slots=True)
class Booking:
    """Where a request in flight is."""

    replica: int
    group: str | None


class Placement:
    """Decides, and keeps the books that every policy needs.

    Every policy is made of the same two values: `page_tokens`, the page size of the engines, and
    `seed`, for what is left to chance.
    """

    def __init__(self, page_tokens: int, seed: int | None = None) -> None:
        self._bookings: dict[str, Booking] = {}
        self._inflight: Counter[int] = Counter()  # requests, by replica
        self._groups: dict[str, dict[str, int]] = {}  # members in flight, eldest first, and where
        self._last = -1  # the replica chosen last

    def choose(self, submission: Submission, free: Sequence[int]) -> int:
        """One of `free`, which is not empty. The submission is booked there until it has ended.

        A member of a group goes where the eldest one in flight is, while that is free: they share a
        prompt.
        """
        group = submission.group
        members = {} if group is None else self._groups.get(group, {})
        home = [replica for replica in list(members.values())[:1] if replica in free]
        self._last = replica = self._place(submission, home or free)
        self._bookings[submission.id] = Booking(replica, group)
        self._inflight[replica] += 1
        if group is not None:
            self._groups.setdefault(group, {})[submission.id] = replica
        return replica

    def _place(self, submission: Submission, free: Sequence[int]) -> int:
        """One of `free`, which holds nothing but the home of the submission's group if that is
        free.
        """
        raise NotImplementedError

    def _turn(self, replica: int) -> tuple[bool, int]:
        """Sorts replicas by whose turn it is: those behind the last one chosen, then the others."""
        return replica <= self._last, replica

    def began(self, id: str) -> None:
        """The first token of a request came: its prompt is computed."""

    def ended(self, id: str) -> None:
        """A request is in flight no more. Unknown ids are ignored."""
        booking = self._bookings.pop(id, None)
        if booking is None:
            return
        self._inflight[booking.replica] -= 1
        if booking.group is not None:
            members = self._groups[booking.group]
            del members[id]
            if not members:
                del self._groups[booking.group]

    def cached(self, replica: int, entered: Sequence[int], evicted: Sequence[int]) -> None:
        """A replica tells which prefixes are new in its cache, and which are gone."""

    def lost(self, replica: int) -> None:
        """A replica is gone, with its cache and all requests booked there."""
        for id in [id for id, booking in self._bookings.items() if booking.replica == replica]:
            self.ended(id)

    def inflight(self, replica: int) -> int:
        """Requests booked on a replica and not ended."""
        return self._inflight[replica]


class RoundRobin(Placement):
    """Each in its turn."""

    def _place(self, submission: Submission, free: Sequence[int]) -> int:
        return min(free, key=self._turn)


class FewestFirst(Placement):
    """The replica with the fewest requests in flight."""

    def _place(self, submission: Submission, free: Sequence[int]) -> int:
        return min(free, key=lambda each: (self.inflight(each), self._turn(each)))


class Random(Placement):
    """Any of them."""

    def __init__(self, page_tokens: int, seed: int | None = None) -> None:
        super().__init__(page_tokens, seed)
        self._chance = random.Random(seed)

    def _place(self, submission: Submission, free: Sequence[int]) -> int:
        return self._chance.choice(free)


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt that a replica was given and has not computed."""

    replica: int
    keys: list[int]  # of its prefixes
    tokens: int  # of it, those that the cache does not answer


class CacheAware(Placement):
    """The replica on which the answer begins soonest, counted in tokens to compute: those of the
    prompt that are not in its cache, those of the prompts before it, and something for each request
    in flight.

    So a prefix stays where it is cached until that replica is so busy that computing it again
    elsewhere costs less. A prompt that was sent counts as cached where it went. Once it has begun,
    the replica's own word counts; of one that never tells, what was sent is believed.
    """

    def __init__(self, page_tokens: int, seed: int | None = None) -> None:
        super().__init__(page_tokens, seed)
        self._block = block_tokens(page_tokens)
        self._index = PrefixIndex()
        self._prefills: dict[str, Prefill] = {}
        self._pending: Counter[int] = Counter()  # tokens of these, by replica
        self._coming: dict[int, Counter[int]] = defaultdict(Counter)  # and keys: how often
        self._telling: set[int] = set()  # replicas that ever told what they cache
        self._sent: Counter[int] = Counter()  # blocks remembered of the others

    def _place(self, submission: Submission, free: Sequence[int]) -> int:
        ids = (*submission.prompt, *submission.received)
        keys = prefix_keys(submission.namespace, ids, self._block)
        missing = self._missing(len(ids), keys, free)

        def rank(replica: int) -> tuple[int, int, tuple[bool, int]]:
            cost = self._cost(replica, missing[replica])
            return cost, self.inflight(replica), self._turn(replica)

        replica = min(free, key=rank)
        self._prefills[submission.id] = Prefill(replica, keys, missing[replica])
        self._pending[replica] += missing[replica]
        self._coming[replica].update(keys)
        return replica

    def _cost(self, replica: int, missing: int) -> int:
        return missing + self._pending[replica] + REQUEST_TOKENS * self.inflight(replica)

    def _missing(self, length: int, keys: Sequence[int], free: Sequence[int]) -> dict[int, int]:
        """Tokens of a prompt that are not cached, nor will be by one sent before, by replica."""
        held = self._index.matched(keys)
        missing = {}
        for replica in free:
            coming = sum(1 for _ in takewhile(self._coming[replica].__contains__, keys))
            blocks = max(held.get(replica, 0), coming)
            missing[replica] = length - blocks * self._block
        return missing

    def _computed(self, id: str) -> Prefill | None:
        """Take a prompt off the books; None when it is off already."""
        prefill = self._prefills.pop(id, None)
        if prefill is not None:
            self._pending[prefill.replica] -= prefill.tokens
            coming = self._coming[prefill.replica]
            coming.subtract(prefill.keys)
            for key in prefill.keys:
                if not coming[key]:
                    del coming[key]
        return prefill

    def began(self, id: str) -> None:
        prefill = self._computed(id)
        if prefill is not None and prefill.replica not in self._telling:
            self._remember(prefill)

    def _remember(self, prefill: Prefill) -> None:
        """Believe that what was sent is cached, for a while."""
        self._sent[prefill.replica] += len(prefill.keys)
        if self._sent[prefill.replica] > SENT_BLOCKS:
            self._forget(prefill.replica)
        self._index.apply(prefill.replica, prefill.keys, ())

    def _forget(self, replica: int) -> None:
        self._index.forget(replica)
        self._sent[replica] = 0

    def ended(self, id: str) -> None:
        super().ended(id)
        self._computed(id)

    def cached(self, replica: int, entered: Sequence[int], evicted: Sequence[int]) -> None:
        if (entered or evicted) and replica not in self._telling:
            self._telling.add(replica)
            self._forget(replica)  # what was only believed
        self._index.apply(replica, entered, evicted)

    def lost(self, replica: int) -> None:
        super().lost(replica)
        self._forget(replica)


PLACEMENTS: dict[str, type[Placement]] = {
    "rr": RoundRobin,
    "fsfs": FewestFirst,
    "random": Random,
    "cache_aware": CacheAware,
}


def open_placement(mode: str, page_tokens: int, seed: int | None = None) -> Placement:
    """The policy of SCHEDULER_MODE `mode`, for engines with pages of `page_tokens` tokens."""
    return PLACEMENTS[mode](page_tokens, seed)
