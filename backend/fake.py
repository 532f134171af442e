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
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from backend.cache import PrefixCache
from backend.fake_model import (
    BYTE_END,
    BYTE_VOCABULARY,
    CONSONANTS,
    POISON,
    VOWELS,
    Digests,
    FakeModel,
    Row,
    digest,
    digests,
)
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
    TokenMask,
)
from config import BackendSettings, FakeSettings, resolve_limits

DEFAULT_TOKENS = 1 << 18  # capacity of the cache, with no budget given
DEFAULT_MODEL_LEN = 8192
LACKS = ("pooling",)


@dataclass(frozen=True, slots=True)
class FakeStep:
    """A step in flight: computed already, done at `done` (time.monotonic()).

    `undrawn` are its masked chunks until they are drawn: (index, candidates of the next token).
    """

    number: int
    plan: StepPlan
    tokens: StepTokens
    done: float
    undrawn: list[tuple[int, Sequence[int]]]


class FakeExecutor:
    """A `StepExecutor` over a numpy array. Steps are computed at launch and done when the script
    says, one after another; collecting waits for that.

    Launching too many steps, or one behind a step that has not drawn, and collecting out of order
    raise RuntimeError: it is a mistake of the scheduler.
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
        if self._flights and self._flights[-1].undrawn:
            raise RuntimeError("a step was launched behind one that has not drawn")
        begun = time.monotonic()
        for setup in plan.taken:
            self._rows[setup.slot] = Row(setup)
        result = StepTokens([])
        undrawn: list[tuple[int, Sequence[int]]] = []
        for index, chunk in enumerate(plan.chunks):
            candidates = self._run(index, chunk, result)
            result.tokens.append(())
            if candidates and index in plan.masked:
                undrawn.append((index, candidates))
            elif candidates:
                self._draw(index, chunk, candidates, result, None)
        seconds = self._script.step_ms / 1e3 + self._script.token_us * plan.tokens / 1e6
        self._busy_until = max(begun, self._busy_until) + seconds
        self._launched += 1
        step = FakeStep(self._launched, plan, result, self._busy_until, undrawn)
        self._flights.append(step)
        return step

    def sample(self, handle: StepHandle, masks: Mapping[int, TokenMask]) -> None:
        """Draw the masked chunks. Takes no time of the script's."""
        if self._flights[-1] is not handle or not handle.undrawn:
            raise RuntimeError("a step was sampled that has nothing left to draw")
        step = self._flights[-1]
        for index, candidates in step.undrawn:
            allowed = _ids_in(masks[index]) if index in masks else None
            self._draw(index, step.plan.chunks[index], candidates, step.tokens, allowed)
        step.undrawn.clear()

    def collect(self, handle: StepHandle) -> StepTokens:
        """Wait until the step is done."""
        if self._flights[0] is not handle or handle.undrawn:
            raise RuntimeError("steps were collected out of order, or before they had drawn")
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
        """Compute one chunk: write, read everything back. Returns the candidates of the token to
        be drawn, none for a chunk that does not sample.
        """
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
        return self.model.candidates(crc32(context.data), end)

    def _draw(
        self,
        index: int,
        chunk: Chunk,
        candidates: Sequence[int],
        result: StepTokens,
        allowed: Sequence[int] | None,
    ) -> None:
        """Draw the token after a chunk."""
        row = self._rows[chunk.slot]
        token = row.sample(self.model, candidates, chunk.start + chunk.count, allowed)
        result.tokens[index] = (token,)
        if chunk.logprobs:
            result.logprobs[index] = [self.model.logprob(token, candidates, chunk.top)]

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


def _ids_in(mask: TokenMask) -> list[int]:
    """The ids of a mask, rising."""
    ids: list[int] = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
    return ids


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
        lacks=LACKS,
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
