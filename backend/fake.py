"""A backend without a model: deterministic answers, scripted step times, scripted faults.

Run it to rehearse clients and overload on a laptop: `BACKEND_IMPL=fake` answers pseudo-words at
once. `FAKE_STEP_MS` and `FAKE_TOKEN_US` make a step as slow as the device to be rehearsed,
`FAKE_DEPTH` lets steps overlap, `FAKE_FAIL_AT_STEP=n` loses the device at the n-th step; the batch
and cache flags mean what they mean anywhere. Everything above the device is the real thing:
scheduler, pages, prefix cache, sampling parameters. Without MODEL_LOCAL_DIR the built-in byte
tokenizer serves; with it, that folder's vocabulary and end tokens.

Memory works as KV does: each position holds a digest of its token and all before it, written
through the slot's page table, and a token is drawn from the whole context read back through that
table. So a page that is wrong, stale, unwritten or of another prefix gives wrong tokens.
`FakeModel.after` says what the right one is, from the ids alone.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from backend.cache import PrefixCache
from backend.interface import (
    Backend,
    BackendSpec,
    Chunk,
    DeviceLost,
    ModelBroken,
    ModelNotFound,
    SamplingParams,
    SlotSetup,
    StepExecutor,
    StepHandle,
    StepPlan,
    StepTokens,
    TokenLogprob,
)
from config import BackendSettings, FakeSettings, resolve_limits

DEFAULT_TOKENS = 1 << 18  # capacity of the cache, with no budget given
DEFAULT_MODEL_LEN = 8192

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

    def sample(self, model: FakeModel, candidates: Sequence[int], position: int) -> int:
        """Draw the token at `position` and remember it."""
        if self.plain and position >= self._setup.min_position:
            self.last = candidates[0]
            return self.last
        logits = self._logits(model, candidates, position)
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


@dataclass(frozen=True, slots=True)
class FakeStep:
    """A step in flight: computed already, done at `done` (time.monotonic())."""

    number: int
    tokens: StepTokens
    done: float


class FakeExecutor:
    """A `StepExecutor` over a numpy array. Steps are computed at launch and done when the script
    says, one after another; collecting waits for that.

    Launching too many steps or collecting out of order raises RuntimeError: it is a mistake of the
    scheduler.
    """

    def __init__(
        self, model: FakeModel, spec: BackendSpec, cache: PrefixCache, script: FakeSettings
    ) -> None:
        self.model = model
        self.spec = spec
        self.cache = cache
        self._script = script
        self._memory = np.full((spec.pages, spec.page_tokens), POISON, dtype=np.uint32)
        longest = min(spec.pages, spec.pages_for(spec.max_model_len))
        self._tables = np.zeros((spec.max_running, longest), dtype=np.intp)
        self._table_sizes = [0] * spec.max_running
        self._rows = [
            Row(SlotSetup(slot, SamplingParams(), 0, (), 0)) for slot in range(spec.max_running)
        ]
        self._flights: deque[FakeStep] = deque()
        self._launched = 0
        self._busy_until = 0.0

    def launch(self, plan: StepPlan) -> FakeStep:
        """Compute the step now; it counts as done when the script says."""
        if len(self._flights) == self.spec.depth:
            raise RuntimeError(f"a step was launched with {self.spec.depth} in flight")
        begun = time.monotonic()
        for setup in plan.taken:
            self._rows[setup.slot] = Row(setup)
        result = StepTokens([])
        result.tokens = [self._run(index, chunk, result) for index, chunk in enumerate(plan.chunks)]
        seconds = self._script.step_ms / 1e3 + self._script.token_us * plan.tokens / 1e6
        self._busy_until = max(begun, self._busy_until) + seconds
        self._launched += 1
        step = FakeStep(self._launched, result, self._busy_until)
        self._flights.append(step)
        return step

    def collect(self, handle: StepHandle) -> StepTokens:
        """Wait until the step is done."""
        if self._flights[0] is not handle:
            raise RuntimeError("steps were collected out of order")
        step = self._flights.popleft()
        time.sleep(max(0.0, step.done - time.monotonic()))
        if 0 < self._script.fail_at_step <= step.number:
            raise DeviceLost(f"the fake device was lost at step {step.number}: FAKE_FAIL_AT_STEP")
        return step.tokens

    def prepare(self) -> bool:
        """Nothing to prepare."""
        return False

    def close(self) -> None:
        """Nothing to give back."""

    def _run(self, index: int, chunk: Chunk, result: StepTokens) -> Sequence[int]:
        """Compute one chunk: write, read everything back, draw."""
        slot, end = chunk.slot, chunk.start + chunk.count
        row = self._rows[slot]
        if chunk.first or chunk.pages:
            self._extend(chunk)
        self._write(chunk, row.last)
        if not (chunk.samples or chunk.targets):
            return ()
        context = self._read(slot, end)
        if chunk.targets:
            result.scores[index] = self._score(chunk, context)
        if not chunk.samples:
            return ()
        candidates = self.model.candidates(crc32(context.data), end)
        token = row.sample(self.model, candidates, end)
        if chunk.logprobs:
            result.logprobs[index] = [self.model.logprob(token, candidates, chunk.top)]
        return (token,)

    def _extend(self, chunk: Chunk) -> None:
        """Append to the slot's page table."""
        held = 0 if chunk.first else self._table_sizes[chunk.slot]
        self._table_sizes[chunk.slot] = held + len(chunk.pages)
        table = self._tables[chunk.slot]
        table[held : held + len(chunk.pages)] = chunk.pages
        table[held + len(chunk.pages) :] = self.spec.pages  # no page: to touch it raises IndexError

    def _write(self, chunk: Chunk, last: int) -> None:
        """Write what a chunk's positions hold, each built on the one ahead of it."""
        memory, table, size = self._memory, self._tables[chunk.slot], self.spec.page_tokens
        start = chunk.start
        before = int(memory[table[(start - 1) // size], (start - 1) % size]) if start else 0
        if chunk.tokens is None:
            memory[table[start // size], start % size] = digest(last, start, before)
        else:
            at = np.arange(start, start + chunk.count)
            memory[table[at // size], at % size] = digests(chunk.tokens, start, before)

    def _read(self, slot: int, length: int) -> Digests:
        """The first `length` positions of a slot, through its page table."""
        pages = self._tables[slot, : self.spec.pages_for(length)]
        return self._memory.take(pages, axis=0).reshape(-1)[:length]

    def _score(self, chunk: Chunk, context: Digests) -> list[TokenLogprob]:
        """Log-probabilities of a chunk's targets, each after the context that ends ahead of it."""
        scores = []
        fingerprint = crc32(context[: chunk.score_start].data)
        for position, target in enumerate(chunk.targets, chunk.score_start + 1):
            fingerprint = crc32(context[position - 1 : position].data, fingerprint)
            candidates = self.model.candidates(fingerprint, position)
            scores.append(self.model.logprob(target, candidates, chunk.top))
        return scores


def open_backend(
    settings: BackendSettings, scheduler: Callable[[StepExecutor], Backend]
) -> Backend:
    """The fake device behind `scheduler`.

    Raises StartFailed when MODEL_LOCAL_DIR holds no model.
    """
    folder = settings.model.local_dir
    model, stop_ids = _byte_model() if folder is None else _folder_model(Path(folder))
    size = settings.cache.page_tokens
    pages = max(1, (settings.cache.budget_tokens or DEFAULT_TOKENS) // size)
    limits = resolve_limits(settings.batch, "cpu")
    spec = BackendSpec(
        name="fake",
        model="fake" if folder is None else settings.model.served_name,
        folder=folder,
        vocabulary=model.vocabulary,
        max_model_len=settings.model.max_model_len or DEFAULT_MODEL_LEN,
        stop_ids=stop_ids,
        page_tokens=size,
        pages=pages,
        max_running=limits.max_running,
        max_step_tokens=limits.max_step_tokens,
        depth=settings.fake.depth,
        device="cpu",
        dtype="uint32",
        attention="none",
        kv_bytes_per_token=4,
    )
    cache = PrefixCache(pages, size, settings.cache.prefix)
    return scheduler(FakeExecutor(model, spec, cache, settings.fake))


def _byte_model() -> tuple[FakeModel, tuple[int, ...]]:
    return FakeModel(BYTE_VOCABULARY, BYTE_END, (tuple(CONSONANTS), tuple(VOWELS))), (BYTE_END,)


def _folder_model(folder: Path) -> tuple[FakeModel, tuple[int, ...]]:
    """A model that answers any id of a checkpoint's vocabulary."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise ModelNotFound(
            f"MODEL_LOCAL_DIR={folder} has no config.json: give a Hugging Face folder, or unset it "
            "for the built-in byte tokenizer"
        )
    size = config.get("vocab_size")
    if not isinstance(size, int) or size < 4:
        raise ModelBroken(f"{folder}/config.json: vocab_size must be a number from 4, got {size!r}")
    generation = _read_json(folder / "generation_config.json") or {}
    ends = generation.get("eos_token_id")
    ends = config.get("eos_token_id") if ends is None else ends
    stop_ids = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    end = stop_ids[0] if stop_ids else None
    return FakeModel(size, end, (range(size), range(size))), stop_ids


def _read_json(path: Path) -> dict[str, Any] | None:
    """None when there is no such file. Raises ModelBroken when it holds something else."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelBroken(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelBroken(f"{path} must hold an object")
    return content
