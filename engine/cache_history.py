"""What the front remembers of the engines' caches, to explain what a prompt would find in them.

Owned by the dispatcher, on its event loop. Blocks that engines hold, as they told; when blocks left
them; the prompts computed last, so that a hit can be told to the page and a miss has a reason. All
of it is bounded and may be late: an answer's `cached_tokens` is the truth.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from backend.prefix_keys import block_tokens, prefix_keys
from engine.live_request import LiveRequest
from engine.prefix_index import PrefixIndex

EVICTIONS = 1 << 14  # blocks of about 64 tokens whose end is remembered, of each replica
RECENT_TOKENS = 1 << 18  # of prompts and answers remembered, of each replica
RECENT_PROMPTS = 1024  # of them, at most
AROUND = 8  # tokens shown on either side of a divergence
STRIDE = 512  # tokens compared at a time

Reason = Literal["all", "short", "evicted", "other_salt", "diverged", "ended", "cold"]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of somebody, and when it is asked about (time.monotonic())."""

    owner: str
    namespace: str
    ids: tuple[int, ...]
    page_tokens: int
    now: float

    @property
    def limit(self) -> int:
        """Positions that a cache may answer: whole pages, and never the last token."""
        return (len(self.ids) - 1) // self.page_tokens * self.page_tokens

    def pages(self, positions: int) -> int:
        """`positions`, as far as they are whole pages that a cache may answer."""
        return min(positions // self.page_tokens * self.page_tokens, self.limit)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a prompt would find on one replica, and why not more.

    `at` and `theirs` are of the prompt that goes on longest with this one, of the same owner: where
    they part ("diverged"), or where that one ends ("ended").
    """

    replica: int
    hit: int  # prompt tokens that the cache would answer
    certain: int  # of these, those that the engine has told of
    reason: Reason
    evicted_s: float | None = None  # seconds since the block behind the hit left the cache
    at: int | None = None
    theirs: tuple[int, ...] = ()  # its tokens around `at`


@dataclass(frozen=True, slots=True)
class Recent:
    """A prompt that a replica has computed, and what it answered so far."""

    owner: str
    namespace: str
    prompt: tuple[int, ...]
    received: list[int]  # the request's own: it grows
    room: int  # tokens that it takes at most

    def cached(self) -> tuple[int, ...]:
        """What was given to the device: all but the token drawn last."""
        return (*self.prompt, *self.received[:-1])


@dataclass(eq=False, slots=True)
class Past:
    """What is remembered of one replica."""

    evictions: dict[int, float] = field(default_factory=dict)  # key -> when, oldest first
    recent: deque[Recent] = field(default_factory=deque)  # oldest first
    tokens: int = 0  # of these, at most

    def told(self, entered: Iterable[int], evicted: Iterable[int], now: float) -> None:
        """Take news of the cache."""
        for key in entered:
            self.evictions.pop(key, None)
        for key in evicted:
            self.evictions[key] = now
        while len(self.evictions) > EVICTIONS:
            del self.evictions[next(iter(self.evictions))]

    def add(self, recent: Recent) -> None:
        """Remember a prompt, in place of the oldest ones."""
        self.recent.append(recent)
        self.tokens += recent.room
        while self.tokens > RECENT_TOKENS or len(self.recent) > RECENT_PROMPTS:
            self.tokens -= self.recent.popleft().room


class CacheHistory:
    """Every replica's cache, as the front knows it."""

    def __init__(self) -> None:
        self._index = PrefixIndex()
        self._pasts: defaultdict[int, Past] = defaultdict(Past)

    def told(
        self, replica: int, entered: Sequence[int], evicted: Sequence[int], now: float
    ) -> None:
        """A replica tells which prefixes are new in its cache, and which are gone."""
        self._index.apply(replica, entered, evicted)
        self._pasts[replica].told(entered, evicted, now)

    def computed(self, request: LiveRequest) -> None:
        """The replica that has a request has computed its prompt."""
        if request.replica is None:
            return
        submission = request.submission
        room = len(submission.prompt) + submission.max_new_tokens
        self._pasts[request.replica].add(
            Recent(request.owner, submission.namespace, submission.prompt, request.received, room)
        )

    def flushed(self, replica: int) -> None:
        """A replica was told to give up what it caches: its short prompts leave without a word."""
        past = self._pasts[replica]
        past.recent.clear()
        past.tokens = 0

    def lost(self, replica: int) -> None:
        """A replica is gone, with its cache."""
        self._index.forget(replica)
        self._pasts.pop(replica, None)

    async def explain(self, question: Question, replicas: Sequence[int]) -> list[Explanation]:
        """What `question` would find on each of `replicas`. Compares prompts in a thread."""
        block = block_tokens(question.page_tokens)
        keys = await asyncio.to_thread(prefix_keys, question.namespace, question.ids, block)
        held = self._index.matched(keys)
        known = []
        for replica in replicas:
            blocks, past = held.get(replica, 0), self._pasts[replica]
            left = past.evictions.get(keys[blocks]) if blocks < len(keys) else None
            evicted = None if left is None else question.now - left
            known.append((replica, blocks * block, evicted, tuple(past.recent)))
        return await asyncio.to_thread(lambda: [_explain(question, *each, block) for each in known])


Likeness = tuple[int, Recent]  # how many tokens a recent prompt begins with in common


def _explain(
    question: Question,
    replica: int,
    told: int,
    evicted_s: float | None,
    recent: Sequence[Recent],
    block: int,
) -> Explanation:
    """The engine `told` of so many tokens; `recent` prompts say how far the block behind them is
    there, of which it would tell when it is full. Of a block that has left nobody knows how much.
    """
    like = [(common(question.ids, each.cached()), each) for each in recent]
    same = [length for length, each in like if each.namespace == question.namespace]
    seen = min(max(same, default=0), told + block - 1) if evicted_s is None else told
    hit = question.pages(max(told, seen))
    found = Explanation(replica, hit, question.pages(told), "cold")
    if question.limit == 0:
        return replace(found, reason="short")
    if hit == question.limit:
        return replace(found, reason="all")
    if evicted_s is not None:
        return replace(found, reason="evicted", evicted_s=evicted_s)
    own = [each for each in like if each[1].owner == question.owner]
    return _from_own(question, found, own)


def _from_own(question: Question, found: Explanation, own: Sequence[Likeness]) -> Explanation:
    """The reason that the owner's own prompts give; those of others stay untold."""
    salted = [same for same, each in own if each.namespace != question.namespace]
    if question.pages(max(salted, default=0)) > found.hit:
        return replace(found, reason="other_salt")
    plain = [(same, each.cached()) for same, each in own if each.namespace == question.namespace]
    at, theirs = max(plain, key=lambda pair: pair[0], default=(0, ()))
    if at == 0 or at < found.hit:
        return found
    reason: Reason = "diverged" if at < len(theirs) else "ended"
    return replace(found, reason=reason, at=at, theirs=around(theirs, at))


def common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(ours), len(theirs))
    start = 0
    while start < length and ours[start : start + STRIDE] == theirs[start : start + STRIDE]:
        start += STRIDE
    rest = range(start, min(start + STRIDE, length))
    return next((index for index in rest if ours[index] != theirs[index]), length)


def around(ids: Sequence[int], at: int) -> tuple[int, ...]:
    """The tokens on either side of position `at`."""
    return tuple(ids[max(0, at - AROUND) : at + AROUND])
