"""The scheduler process of SGLang 0.5.17, as far as our adapter can tell: which requests run, what
they draw, when they end, what the cache answers.

Written from its source, by its rules and not by ours: chunked prefill and first come first served,
retraction of the youngest, a radix cache of whole pages, `logit_bias` before everything else,
top_k and top_p as one joint filter, no stop at all with `ignore_eos`, a length that goes before a
stop, lengths cut to what its pool holds. The model is `FakeModel`: four candidates after a context.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.cache import Lease, PrefixCache
from backend.fake_model import FLOOR, LOGITS, FakeModel, uniform

Logits = NDArray[np.float64]

GREEDY_BELOW = 1e-6
EVERY_TOKEN = 1 << 30


@dataclass(frozen=True)
class Sampling:
    """The fields of SGLang's SamplingParams that a caller may give; others are a TypeError."""

    max_new_tokens: int = 128
    stop_token_ids: Sequence[int] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    ignore_eos: bool = False
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None

    def verify(self, vocabulary: int) -> None:
        """Raises ValueError as SGLang's does."""
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k != -1 and not 1 <= self.top_k < 1 << 31:
            raise ValueError(f"top_k must be -1 (disable) or at least 1, got {self.top_k}.")
        for token in self.logit_bias or ():
            if not (isinstance(token, str) and 0 <= int(token) < vocabulary):
                raise ValueError(f"logit_bias must has keys in [0, {vocabulary - 1}], got {token}.")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1


@dataclass(eq=False)
class Req:
    """A request at work."""

    rid: str
    prompt: list[int]
    sampling: Sampling
    extra_key: str
    logprobs: bool
    logprob_start: int  # -1: of generated tokens alone
    top: int
    most: int  # max_new_tokens, as far as its pool goes
    out: list[int] = field(default_factory=list)
    out_scores: list[Any] = field(default_factory=list)
    prompt_scores: list[Any] | None = None
    lease: Lease | None = None
    computed: int = 0
    cached: int | None = None
    retractions: int = 0
    to_finish: dict[str, Any] | None = None
    finish: dict[str, Any] | None = None

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.out


ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


class Scheduler:
    """Steps over requests. Each step brings at most one token of a request."""

    def __init__(
        self,
        model: FakeModel,
        eos: frozenset[int],
        pages: int,
        page_size: int,
        rows: int,
        budget: int,
        radix: bool,
        deterministic: bool,
        raw_scores: bool,
    ) -> None:
        self.model, self.eos = model, eos
        self.rows, self.budget = rows, budget
        self.deterministic, self.raw_scores = deterministic, raw_scores
        self.cache = PrefixCache(pages, page_size, radix)
        self.queue: deque[Req] = deque()
        self.running: list[Req] = []

    @property
    def idle(self) -> bool:
        return not (self.queue or self.running)

    def limit(self, prompt: int, asked: int, context: int) -> int:
        """`init_req_max_new_tokens`."""
        size, tokens = self.cache.page_tokens, self.cache.pool.size * self.cache.page_tokens
        longest = min(context, tokens) - 1
        paged = -(-prompt // size) * size
        return max(0, min(asked, longest - prompt - 1, tokens - paged - size - 1))

    def abort(self, rid: str) -> list[Req]:
        """End all whose id begins so. Returns those that waited: their end is told at once."""
        gone = [req for req in self.queue if req.rid.startswith(rid)]
        for req in gone:
            self.queue.remove(req)
        for req in self.running:
            if req.rid.startswith(rid):
                req.to_finish = ABORTED
        return gone

    def step(self) -> list[Req]:
        """One batch. Returns the requests that have something new."""
        decodes = [req for req in self.running if req.out or req.computed == len(req.prompt)]
        news = []
        for req in decodes:
            if req in self.running and self._grow(req):
                news.append(req)
        left = self.budget
        for req in [req for req in self.running if req not in decodes]:
            left = self._prefill(req, left, news)
        while self.queue and left > 0 and len(self.running) < self.rows:
            req = self.queue[0]
            limit = len(req.ids) - 1
            if req.logprobs and req.logprob_start >= 0:
                limit = min(limit, req.logprob_start)
            req.lease = self.cache.lease(req.extra_key, req.ids, limit)
            if req.lease is None:
                break
            self.running.append(self.queue.popleft())
            req.computed = req.lease.shared
            if req.cached is None:
                req.cached = req.lease.shared
            left = self._prefill(req, left, news)
        for req in news:
            self._settle(req)
        return news

    def _grow(self, req: Req) -> bool:
        assert req.lease is not None
        while not self.cache.grow(req.lease, len(req.ids)):
            self._retract(self.running[-1])
            if req.lease is None:
                return False
        req.computed = len(req.ids)
        return True

    def _retract(self, req: Req) -> None:
        assert req.lease is not None
        self.running.remove(req)
        self.cache.close(req.lease)
        req.lease, req.computed = None, 0
        req.retractions += 1
        self.queue.appendleft(req)

    def _prefill(self, req: Req, left: int, news: list[Req]) -> int:
        count = min(left, len(req.ids) - req.computed)
        req.computed += count
        if req.computed == len(req.ids):
            news.append(req)
        return left - count

    def _settle(self, req: Req) -> None:
        """Draw, and see whether it ends: `update_finish_state`."""
        assert req.lease is not None
        self.cache.commit(req.lease, req.ids, req.computed)
        if req.logprobs and req.logprob_start >= 0 and req.prompt_scores is None:
            req.prompt_scores = self._prompt_scores(req)
        raw = self.logits(req.ids)
        edited = raw.copy()
        for biased, bias in (req.sampling.logit_bias or {}).items():
            edited[int(biased)] += bias
        token = self._draw(req, edited)
        scored = edited if self.raw_scores or req.sampling.greedy else edited / (
            req.sampling.temperature
        )  # fmt: skip
        req.out_scores.append(scores(scored, token, req.top))
        req.out.append(token)
        if req.to_finish is not None:
            req.finish = req.to_finish
        elif len(req.out) >= req.most:
            req.finish = {"type": "length", "length": req.most}
            del req.out[req.most :]
        elif not req.sampling.ignore_eos and (
            token in (req.sampling.stop_token_ids or ()) or token in self.eos
        ):
            req.finish = {"type": "stop", "matched": token}
        if req.finish is not None:
            self.running.remove(req)
            self.cache.close(req.lease)

    def logits(self, ids: Sequence[int]) -> Logits:
        found = np.full(self.model.vocabulary, FLOOR)
        found[list(self.model.after(ids))] = LOGITS
        return found

    def _draw(self, req: Req, logits: Logits) -> int:
        """`Sampler.forward`: the joint filter of its torch implementation."""
        sampling = req.sampling
        if sampling.greedy:
            return int(np.argmax(logits))
        if sampling.min_p and self.deterministic:
            raise AssertionError("With sampling seed, multinomial_with_seed will be wrong")
        probs = softmax(logits / sampling.temperature)
        order = np.argsort(-probs, kind="stable")
        ranked = probs[order]
        before = np.cumsum(ranked) - ranked
        ranks = np.arange(len(ranked))
        most = EVERY_TOKEN if sampling.top_k == -1 else sampling.top_k
        kept = (ranks < most) & (before <= sampling.top_p) & (ranked >= sampling.min_p * ranked[0])
        sums = np.cumsum(np.where(kept, ranked, 0.0))
        chance = random.random()
        if self.deterministic:
            seed = 42 if sampling.sampling_seed is None else sampling.sampling_seed
            chance = uniform(seed, len(req.ids))
        return int(order[np.searchsorted(sums, chance * sums[-1], side="right")])

    def _prompt_scores(self, req: Req) -> list[Any]:
        """Of the raw logits; nothing is known of the first."""
        start = req.logprob_start
        found: list[Any] = [((None, req.prompt[start], None), None)]
        for at in range(start + 1, len(req.prompt)):
            found.append(scores(self.logits(req.prompt[:at]), req.prompt[at], req.top))
        return found


def softmax(logits: Logits) -> Logits:
    powers = np.exp(logits - logits.max())
    found: Logits = powers / powers.sum()
    return found


def scores(logits: Logits, token: int, top: int) -> tuple[Any, Any]:
    """(logprob, id, text) of a token, and of the most probable ones."""
    told = np.log(softmax(logits))
    best = np.argsort(-told, kind="stable")[:top]
    return (float(told[token]), token, None), [(float(told[id]), int(id), None) for id in best]
