"""How the tokens of one row are drawn: in the order that `SamplingParams` says, and from what.

mlx-lm shows each row's raw logits to its processors and what they make of them to its sampler, for
each token once, and does so a step before the token is handed out. So what is told of a token waits
here until somebody asks.

The draw takes the largest of logits with Gumbel noise, whose key is SplitMix64 as a hash of (seed,
position), Steele et al. 2014. Nucleus (top_p): Holtzman et al. 2020. min_p: Nguyen et al. 2024.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from backend.interface import SamplingParams, Submission, TokenLogprob, TokenMask
from backend.mlx.grammars import Follower

WORD = (1 << 64) - 1
SMALLEST = float(np.finfo(np.float32).tiny)  # temperature: less would be 0


def draw_key(seed: int, position: int) -> mx.array:
    """What the draw of the token at `position` takes for chance: output number `position` of
    SplitMix64 from `seed`.
    """
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & WORD
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & WORD
    return mx.random.key(mixed ^ (mixed >> 31))


def filtered(logits: mx.array, sampling: SamplingParams) -> mx.array:
    """Logits [1, vocabulary] over the temperature, the largest at 0, and -inf where a filter does
    not keep the token.
    """
    scaled = logits - mx.max(logits, axis=-1, keepdims=True)
    scaled = scaled / max(sampling.temperature, SMALLEST)
    if 0 < sampling.top_k < scaled.shape[-1]:
        edge = mx.min(mx.topk(scaled, sampling.top_k, axis=-1), axis=-1, keepdims=True)
        scaled = mx.where(scaled >= edge, scaled, -math.inf)
    if sampling.top_p < 1:
        weights = mx.exp(scaled)
        scaled = mx.where(weights >= _nucleus(weights, sampling.top_p), scaled, -math.inf)
    if sampling.min_p > 0:
        scaled = mx.where(mx.exp(scaled) >= sampling.min_p, scaled, -math.inf)
    return scaled


def _nucleus(weights: mx.array, share: float) -> mx.array:
    """The smallest weight [1, 1] among the most probable ones that have `share` of the whole."""
    falling = -mx.sort(-weights, axis=-1)
    sums = mx.cumsum(falling, axis=-1)
    before = mx.sum(sums < share * sums[:, -1:], axis=-1, keepdims=True)
    return mx.take_along_axis(falling, mx.minimum(before, weights.shape[-1] - 1), axis=-1)


def penalised(
    logits: mx.array, known: mx.array, prompt_tokens: int, sampling: SamplingParams
) -> mx.array:
    """Logits [1, vocabulary] after the penalties for the ids `known` [positions], of which the
    first `prompt_tokens` were not drawn.
    """
    zeros = mx.zeros(logits.shape[-1], dtype=mx.float32)
    drawn = zeros.at[known[prompt_tokens:]].add(1.0)
    seen = zeros.at[known].add(1.0) > 0
    # within what float32 holds: 0 * inf would be NaN
    repetition = min(max(sampling.repetition_penalty, 1e-30), 1e30)
    repeated = mx.where(logits > 0, logits / repetition, logits * repetition)
    less = drawn * sampling.frequency_penalty + (drawn > 0) * sampling.presence_penalty
    largest = float(np.finfo(np.float32).max)
    return mx.where(seen, mx.minimum(repeated - less, largest), logits)


def bound(logits: mx.array, mask: TokenMask) -> mx.array:
    """Logits [1, vocabulary], -inf for the ids that are not in `mask`."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: logits.shape[-1]]
    return mx.where(mx.array(bits.astype(bool)), logits, -math.inf)


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """Log-probabilities that may still be computed: of chosen tokens, and the most probable."""

    chosen: mx.array  # [rows, 1] float32
    ids: mx.array  # [rows, top] in any order
    values: mx.array  # [rows, top] float32

    @classmethod
    def start(cls, logits: mx.array, tokens: mx.array, top: int) -> Scores:
        """Of `tokens` [rows] under raw `logits` [rows, vocabulary]. Does not wait."""
        norm = mx.logsumexp(logits, axis=-1, keepdims=True)
        most = min(top, logits.shape[-1])
        ids = mx.zeros((len(logits), 0), dtype=mx.uint32)
        if most:
            ids = mx.argpartition(-logits, kth=most - 1, axis=-1)[:, :most]
        found = cls(
            mx.take_along_axis(logits, tokens[:, None], axis=-1) - norm,
            ids,
            mx.take_along_axis(logits, ids, axis=-1) - norm,
        )
        mx.async_eval(found.chosen, found.ids, found.values)
        return found

    def read(self, tokens: Sequence[int]) -> list[TokenLogprob]:
        """Wait for them. `tokens` are the chosen ones; of a tie the lowest id goes first."""
        rows = zip(
            tokens, self.chosen.tolist(), self.ids.tolist(), self.values.tolist(), strict=True
        )
        return [
            TokenLogprob(token, chosen[0], _best_first(ids, values))
            for token, chosen, ids, values in rows
        ]


def _best_first(ids: Sequence[int], values: Sequence[float]) -> tuple[tuple[int, float], ...]:
    pairs = zip(ids, values, strict=True)
    return tuple(sorted(pairs, key=lambda each: (-each[1], each[0])))


class RowDraws:
    """The draws of one row, from its first to its last. One owner: its sequence."""

    def __init__(
        self, submission: Submission, stop_ids: Sequence[int], follower: Follower | None = None
    ) -> None:
        """`stop_ids` are not drawn before the least length; `follower` is of a grammar, which says
        that by itself.
        """
        self._sampling, self._wants = submission.sampling, submission.wants
        self._seed = submission.seed
        self._prompt_tokens = len(submission.prompt)
        self._first = self._prompt_tokens + len(submission.received)  # position of the first draw
        self._position = self._first  # of the next draw
        self._least = self._prompt_tokens + self._sampling.min_new_tokens
        self._follower = follower
        self._biases = _biases(self._sampling)
        unstoppable = follower is None and self._least > self._first and len(stop_ids) > 0
        self._barred = mx.array([list(stop_ids)]) if unstoppable else None
        self._raw: mx.array | None = None  # logits of the draw under way
        self._scores: deque[Scores] = deque()  # of tokens that were not handed out

    @property
    def processes(self) -> bool:
        """Whether the row wants to see its logits."""
        edits = self._biases is not None or self._barred is not None or self._sampling.penalised
        return edits or self._wants.logprobs or self._follower is not None

    @property
    def samples(self) -> bool:
        """Whether the row draws by itself, and does not take the most probable token."""
        return self._wants.logprobs or self._sampling.temperature > 0

    def process(self, known: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, vocabulary] as they are drawn from, given the raw ones, and all ids so far,
        `known` [positions].
        """
        self._raw = logits
        position = known.shape[0]
        if self._follower is not None:
            last = None if position == self._first else int(known[-1].item())
            mask = self._follower.allow(last, position >= self._least)
            logits = logits if mask is None else bound(logits, mask)
        if self._sampling.penalised:
            logits = penalised(logits, known, self._prompt_tokens, self._sampling)
        if self._biases is not None:
            ids, biases = self._biases
            logits = logits.at[:, ids].add(biases)
        if self._barred is not None and position < self._least:
            logits = mx.put_along_axis(logits, self._barred, mx.array(-math.inf), axis=-1)
        return logits

    def sample(self, logits: mx.array) -> mx.array:
        """The token [1] that is drawn from `logits` [1, vocabulary]."""
        if self._sampling.temperature > 0:
            key = draw_key(self._seed, self._position)
            token = mx.random.categorical(filtered(logits, self._sampling), key=key)
        else:
            token = mx.argmax(logits, axis=-1)
        if self._wants.logprobs:
            assert self._raw is not None, "a row that wants log-probabilities sees its logits"
            self._scores.append(Scores.start(self._raw, token, self._wants.top))
        self._position += 1
        return token

    def score(self, token: int) -> tuple[TokenLogprob, ...]:
        """The log-probability of the next `token` that is handed out, if that was asked for."""
        return tuple(self._scores.popleft().read([token])) if self._scores else ()


def _biases(sampling: SamplingParams) -> tuple[mx.array, mx.array] | None:
    """Ids and what is added to their logits; None: nothing."""
    if not sampling.logit_bias:
        return None
    ids, biases = zip(*sampling.logit_bias, strict=True)
    return mx.array(ids), mx.array(biases, dtype=mx.float32)
