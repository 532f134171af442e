"""A `Backend` over mlx-lm's batch generator: who runs, what it draws, when it ends, what stays.

Owned by the engine, one thread. mlx-lm computes: a step decodes a token of every row, and goes on
with the prompts that are under way. Rows never yield, so a sequence is admitted with all the pages
that it may need.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait as wait_for
from contextlib import contextmanager
from typing import Any

from backend.grammar import Grammars
from backend.interface import (
    EXPIRED,
    BackendSpec,
    Delta,
    DeviceLost,
    Finish,
    Load,
    StepOutput,
    Submission,
    first_line,
)
from backend.mlx.grammars import Follower
from backend.mlx.library import Batch, Model, Progress, PromptCache, can_cut, computing
from backend.mlx.pages import Pages
from backend.mlx.prefixes import PrefixStore
from backend.mlx.reading import Reader
from backend.mlx.sequence import Sequence

logger = logging.getLogger(__name__)


class MlxBackend:
    """See `Backend`. What mlx computes is computed within `advance` and `warm` alone."""

    def __init__(self, model: Model, spec: BackendSpec, stream: Any, prefix: bool) -> None:
        self._model = model
        self._spec = spec
        self._stream = stream
        with computing(stream):
            self._batch = Batch(model, spec.max_running, spec.max_step_tokens, stream)
        # a state that all positions share takes up the padding too, in some of mlx-lm's models
        self._pads = can_cut(model.new_cache())
        self._pages = Pages(spec.pages, PrefixStore(spec.page_tokens, prefix))
        self._grammars = Grammars(spec)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        self._leaving: list[Sequence] = []  # ended, and not out of the batch yet
        self._rows: dict[int, Sequence] = {}  # of the batch, by number
        self._live: dict[str, Sequence] = {}  # until their finish has gone out
        self._news: list[Delta] = []  # what happened between two steps
        self._steps = 0

    @property
    def spec(self) -> BackendSpec:
        return self._spec

    # Requests

    def submit(self, submission: Submission) -> None:
        """Queue a submission. It ends at once when nothing is left to generate."""
        sequence = Sequence.of(submission, self.spec)
        self._live[submission.id] = sequence
        if submission.received and len(sequence.ids) >= sequence.limit:
            self._finish(sequence, Finish("length"))
            return
        if submission.sampling.grammar is not None:
            sequence.follower = Follower(self._grammars, submission)
        self._waiting.append(sequence)

    def cancel(self, id: str) -> None:
        """End a sequence with finish "abort"; an unknown id is ignored."""
        sequence = self._live.get(id)
        if sequence is None:
            return
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._leave(sequence)
        self._finish(sequence, Finish("abort"))

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        """Say that a sequence ended without a new token."""
        del self._live[sequence.submission.id]
        self._news.append(sequence.news(finish=finish))

    def _leave(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch, before its next step."""
        self._running.remove(sequence)
        self._leaving.append(sequence)

    # Steps

    def advance(self, wait: float) -> StepOutput:
        """Admit who fits, and do a step.

        Blocks for `wait` only where all that is left waits for a grammar to be compiled.
        """
        output = StepOutput()
        self._expire(time.monotonic())
        self._open_grammars()
        with self._computing():
            self._retire()
            self._admit()
            if self._running:
                self._step(output)
            self._retire()
        output.deltas[:0], self._news = self._news, []
        if not (self._running or output.deltas):
            self._wait_for_grammars(wait)
        output.entered, output.evicted = self._pages.events()
        return output

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Where mlx is called. Raises DeviceLost for whatever it raises."""
        try:
            with computing(self._stream):
                yield
        except Exception as error:
            logger.error("mlx failed", exc_info=error)
            raise DeviceLost(f"mlx failed: {first_line(error)}") from error

    def _expire(self, now: float) -> None:
        """End the waiting sequences whose deadline passed before they ran."""
        for sequence in [each for each in self._waiting if each.is_late(now)]:
            self._waiting.remove(sequence)
            self._finish(sequence, EXPIRED)

    def _open_grammars(self) -> None:
        """Let sequences start whose grammar has been compiled, and end those that have none."""
        for sequence in [each for each in self._waiting if each.waits]:
            assert sequence.follower is not None, "it waits for nothing else"
            finish = sequence.follower.open() if sequence.follower.compiled.done() else None
            if finish is not None:
                self._waiting.remove(sequence)
                self._finish(sequence, finish)

    def _wait_for_grammars(self, seconds: float) -> None:
        """Until a grammar has come that is waited for, so long at most."""
        waiting = [each.follower for each in self._waiting if each.waits]
        coming = [each.compiled for each in waiting if each is not None]
        if coming:
            wait_for(coming, seconds, FIRST_COMPLETED)

    def _admit(self) -> None:
        """Start waiting sequences in order, while there are rows, pages and a step's room for
        their prompts.

        Passed over are a sequence whose group has a prompt under way, as it will share that, and
        one whose grammar is still compiled.
        """
        under_way = {each.submission.group for each in self._running if not each.settled}
        for sequence in list(self._waiting):
            if len(self._running) == self.spec.max_running:
                return
            group = sequence.submission.group
            if (group is not None and group in under_way) or sequence.waits:
                continue
            if not self._start(sequence):
                return
            self._waiting.remove(sequence)
            self._running.append(sequence)
            under_way.add(group)

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its pages, and begin with its prompt. False: not now."""
        submission = sequence.submission
        match = self._pages.match(submission.namespace, sequence.ids, sequence.match_limit)
        shared = 0 if match is None else match.positions
        width = min(len(sequence.ids) - shared, self.spec.max_step_tokens)
        if self._crowded(width):
            return False
        if not self._pages.reserve(sequence, self.spec.pages_for(sequence.limit)):
            return False
        cache = self._model.new_cache() if match is None else match.copy()
        sequence.begin(shared, width)
        end = sequence.read_until
        if end > shared:
            sequence.reader = Reader(self._model, cache, sequence.ids, shared, end)
        else:
            self._enter(sequence, cache)
        return True

    def _crowded(self, width: int) -> bool:
        """Whether prompts under way leave no room in a step for `width` positions of another: they
        are one array, as long for each as for the longest, where a model may be shown such padding.
        """
        widths = [each.width for each in self._running if not each.settled]
        if not widths:
            return False
        padded = (len(widths) + 1) * max(width, *widths)
        return not self._pads or padded > self.spec.max_step_tokens

    def _enter(self, sequence: Sequence, cache: PromptCache) -> None:
        """Make a row of the batch of a sequence whose first positions `cache` holds."""
        draws = sequence.draws = sequence.new_draws()
        sequence.row = self._batch.add(
            sequence.ids,
            sequence.computed,
            cache,
            [draws.process] if draws.processes else [],
            draws.sample if draws.samples else None,
        )
        sequence.held = sequence.computed
        self._rows[sequence.row] = sequence

    def _step(self, output: StepOutput) -> None:
        """Go on with everything that runs."""
        launched = time.monotonic()
        for sequence in self._running:
            sequence.steps += 1
            sequence.rows += len(self._running)
        reading = next((each for each in self._running if each.reader is not None), None)
        if reading is not None:
            self._read(reading, output)
        if self._rows:
            prompts, tokens = self._batch.step()
            for progress in prompts:
                self._settle_prompt(progress, output)
            for row, token in tokens:
                self._settle_token(self._rows[row], token, output)
        self._steps += 1
        output.step_seconds = time.monotonic() - launched

    def _read(self, sequence: Sequence, output: StepOutput) -> None:
        """Go on with a prompt that mlx-lm does not read for us."""
        reader = sequence.reader
        assert reader is not None, "a sequence that is read"
        wants = sequence.submission.wants
        scores = reader.read(self.spec.max_step_tokens, sequence.score_from, wants.top)
        sequence.scores += scores
        self._advance_prompt(sequence, reader.position, output)
        if not reader.done:
            return
        if sequence.draws_nothing:
            sequence.settled = True
            self._settle_finish(sequence, sequence.news(finish=Finish("length")), output)
        else:
            sequence.reader = None
            self._enter(sequence, reader.cache)

    def _settle_prompt(self, progress: Progress, output: StepOutput) -> None:
        """Take what a step says of a prompt."""
        sequence = self._rows[progress.row]
        sequence.settled = progress.done
        self._advance_prompt(sequence, sequence.held + progress.computed, output)
        if progress.done and self._has_siblings(sequence):
            self._keep(sequence)

    def _advance_prompt(self, sequence: Sequence, computed: int, output: StepOutput) -> None:
        output.step_tokens += computed - sequence.computed
        sequence.computed = computed
        news = sequence.progress()
        if news is not None:
            output.deltas.append(news)

    def _has_siblings(self, sequence: Sequence) -> bool:
        """Whether answers of its group wait for its prompt."""
        group = sequence.submission.group
        return group is not None and any(each.submission.group == group for each in self._waiting)

    def _settle_token(self, sequence: Sequence, token: int, output: StepOutput) -> None:
        """Take a token that a step has brought; the one behind it is under way already."""
        output.step_tokens += 1
        sequence.computed += 1
        delta = sequence.take(token)
        if delta.finish is None:
            output.deltas.append(delta)
        else:
            self._settle_finish(sequence, delta, output)

    def _settle_finish(self, sequence: Sequence, last: Delta, output: StepOutput) -> None:
        output.deltas.append(last)
        del self._live[sequence.submission.id]
        self._leave(sequence)

    # What is left behind

    def _retire(self) -> None:
        """Take row and pages back from those that have left, and keep what they computed."""
        if not self._leaving:
            return
        for sequence in self._leaving:
            self._pages.release(sequence)
            self._keep(sequence)
        rows = [each.row for each in self._leaving if each.row is not None]
        self._batch.remove(rows)
        for row in rows:
            del self._rows[row]
        self._leaving.clear()

    def _keep(self, sequence: Sequence) -> None:
        """Keep what is computed of a sequence for those to come, but for the last token it drew:
        that it has been an input already is mlx-lm's way of running ahead.
        """
        if not self._pages.keeps:
            return
        if sequence.reader is not None:
            cache, ids = sequence.reader.cache, sequence.ids[: sequence.reader.position]
        else:
            assert sequence.row is not None, "it is read, or a row"
            cache, ids = self._batch.extract(sequence.row)
        wanted = len(ids) - (len(ids) > sequence.known)
        self._pages.keep(sequence.submission.namespace, ids, cache, wanted)

    # The rest of the protocol

    def fileno(self) -> int | None:
        """None: `advance` is where the work is done."""
        return None

    def load(self) -> Load:
        """How busy the batch and the pages are."""
        return Load(
            running=len(self._running) + len(self._leaving),
            waiting=len(self._waiting),
            pages_total=self._pages.total,
            pages_free=self._pages.free,
            pages_cached=self._pages.cached,
            pages_leased=self._pages.leased,
            preemptions=0,
            steps=self._steps,
        )

    def warm(self, tokens: int) -> int:
        """Generate `tokens` tokens for nobody, at most what the context and the pages hold.

        Returns how many.
        """
        room = min(self.spec.max_model_len, self._pages.total * self.spec.page_tokens) - 1
        wanted, drawn = min(tokens, room), 0
        with self._computing():
            self._retire()
            row = self._batch.add([0], 0, self._model.new_cache())
            while drawn < wanted:
                drawn += len(self._batch.step()[1])
                self._steps += 1
            self._batch.remove([row])
        return drawn

    def prepare(self) -> bool:
        """Nothing to prepare."""
        return False

    def flush(self) -> int:
        """Give up every kept prefix."""
        return self._pages.flush()

    def close(self) -> None:
        """Give back the device."""
        self._grammars.close()
        self._pages.flush()
        self._batch.close()
