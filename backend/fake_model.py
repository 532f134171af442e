"""What stands in for the weights of the fake device: a pure function from a context to four
candidates, and the draw of one of them by sampling parameters.

Used by `backend/fake.py`; tests take it as the oracle. `FakeModel.after` says what the right
candidates are, from the ids alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from backend.interface import SamplingParams, SlotSetup, TokenLogprob

BYTE_VOCABULARY = 260  # of the built-in tokenizer
BYTE_END = 257
VOWELS = b"aeiouaei"  # read in windows of four different letters
CONSONANTS = b"ntr mls dkp cbg ntr"

LOGITS = (3.0, 2.0, 1.0, 0.0)  # of the four candidates, best first
FLOOR = -15.0  # of every other token
END_ONE_IN = 32  # contexts that have the end token among the candidates, at any of the four ranks

MIX = 2654435761  # Knuth's multiplicative hash
WORD = 0xFFFFFFFF
POISON = 0xDEADBEEF  # what a position holds that was never written

Digests = NDArray[np.uint32]


def digests(tokens: Sequence[int], start: int = 0, before: int = 0) -> Digests:
    """What the positions `start ...` hold: each its token, mixed with its position and added to
    `before`, what the position ahead holds, mod 2**32.
    """
    odd = np.arange(2 * start + 1, 2 * (start + len(tokens)) + 1, 2, dtype=np.uint32)
    mixed = (np.asarray(tokens, dtype=np.uint32) + np.uint32(1)) * odd * np.uint32(MIX)
    sums: Digests = np.cumsum(mixed, dtype=np.uint32)
    sums += np.uint32(before)
    return sums


def digest(token: int, position: int, before: int) -> int:
    """`digests` of a single position."""
    return (before + (token + 1) * (2 * position + 1) * MIX) & WORD


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What stands in for weights: a pure function from a context to four candidates."""

    vocabulary: int
    end: int | None  # the id that ends an answer
    letters: tuple[Sequence[int], Sequence[int]]  # candidates at even and at odd positions

    def candidates(self, fingerprint: int, position: int) -> Sequence[int]:
        """The four most probable tokens at `position`, best first, after a context with
        `fingerprint` (crc32 of its digests).
        """
        letters = self.letters[position & 1]
        at = (fingerprint >> 8) % (len(letters) - 3)
        four = letters[at : at + 4]
        if fingerprint % END_ONE_IN or self.end is None or self.end in four:
            return four
        rank = (fingerprint >> 5) & 3
        return (*four[:rank], self.end, *four[rank:3])

    def after(self, context: Sequence[int]) -> Sequence[int]:
        """The four candidates after `context`, from the ids alone: the oracle of tests.

        A greedy answer takes the first.
        """
        return self.candidates(crc32(digests(context).data), len(context))

    def logprob(self, token: int, candidates: Sequence[int], top: int) -> TokenLogprob:
        """`token` and the `top` most probable tokens with their raw log-probabilities."""
        total = sum(map(math.exp, LOGITS)) + (self.vocabulary - 4) * math.exp(FLOOR)
        raw = dict(zip(candidates, LOGITS, strict=True))
        others = (other for other in range(self.vocabulary) if other not in raw)
        ranked = [*raw, *islice(others, max(0, top - 4))][:top]
        scored = [(each, raw.get(each, FLOOR) - math.log(total)) for each in (token, *ranked)]
        return TokenLogprob(*scored[0], top=tuple(scored[1:]))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else (splitmix64: Steele et al. 2014)."""
    state = (seed + (position + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return ((state ^ (state >> 31)) >> 11) / 2**53


def weigh(logits: Mapping[int, float], sampling: SamplingParams) -> list[tuple[int, float]]:
    """What temperature and the filters leave, best first, with weights (the best token's is 1)."""
    ranked = sorted(logits.items(), key=lambda item: (-item[1], item[0]))
    best = ranked[0][1]
    if not sampling.temperature:
        return [(ranked[0][0], 1.0)]
    weights = [(token, math.exp((logit - best) / sampling.temperature)) for token, logit in ranked]
    least = sampling.min_p
    if 0 < sampling.top_k < len(weights):
        least = max(least, weights[sampling.top_k - 1][1])
        weights = [pair for pair in weights if pair[1] >= weights[sampling.top_k - 1][1]]
    sums = accumulate(weight for _, weight in weights)
    mass = sampling.top_p * sum(weight for _, weight in weights)
    last = bisect_left(list(sums), mass)
    if last < len(weights):
        least = max(least, weights[last][1])
    return [pair for pair in weights if pair[1] >= least]


def draw(kept: Sequence[tuple[int, float]], chance: float) -> int:
    """The token at `chance`, in [0, 1), of the distribution that `weigh` left."""
    sums = list(accumulate(weight for _, weight in kept))
    return kept[min(bisect_right(sums, chance * sums[-1]), len(kept) - 1)][0]


class Row:
    """The sampling state of one slot, advanced by each token drawn."""

    __slots__ = ("_counts", "_seen", "_setup", "last", "plain")

    def __init__(self, setup: SlotSetup) -> None:
        sampling = setup.sampling
        self._setup = setup
        self._seen = {*setup.prompt, *setup.output}
        self._counts = Counter(setup.output)
        self.plain = not (sampling.temperature or sampling.penalised or sampling.logit_bias)
        self.last = 0  # the id drawn last: the input of a decode

    def sample(
        self,
        model: FakeModel,
        candidates: Sequence[int],
        position: int,
        allowed: Sequence[int] | None = None,
    ) -> int:
        """Draw the token at `position`, one of `allowed` (rising ids; None: any), and remember
        it.
        """
        if self.plain and allowed is None and position >= self._setup.min_position:
            self.last = candidates[0]
            return self.last
        logits = self._logits(model, candidates, position)
        if allowed is not None:
            among = frozenset(allowed)
            logits = {id: logit for id, logit in logits.items() if id in among}
            logits = logits or {allowed[0]: FLOOR}
        token = draw(weigh(logits, self._setup.sampling), uniform(self._setup.seed, position))
        self._seen.add(token)
        self._counts[token] += 1
        self.last = token
        return token

    def _logits(
        self, model: FakeModel, candidates: Sequence[int], position: int
    ) -> Mapping[int, float]:
        """Logits of all that may be drawn: candidates, biased and seen tokens.

        Any other token is too improbable, unless nothing else is left.
        """
        sampling = self._setup.sampling
        logits = dict(zip(candidates, LOGITS, strict=True))
        if sampling.penalised:
            for token in self._seen:
                logits[token] = self._penalised(token, logits.get(token, FLOOR))
        for token, bias in sampling.logit_bias:
            logits[token] = logits.get(token, FLOOR) + bias
        if position < self._setup.min_position:
            for token in self._setup.stop_ids:
                logits.pop(token, None)
        if not logits:
            stops = frozenset(self._setup.stop_ids)
            logits[next((id for id in range(model.vocabulary) if id not in stops), 0)] = FLOOR
        return logits

    def _penalised(self, token: int, logit: float) -> float:
        sampling, count = self._setup.sampling, self._counts[token]
        factor = sampling.repetition_penalty
        logit = logit / factor if logit > 0 else logit * factor
        return logit - sampling.frequency_penalty * count - sampling.presence_penalty * (count > 0)
