"""Sequences whose answers a grammar binds: they wait for it to be compiled, and tell what each of
their tokens may be.

Owned by the scheduler, which asks nothing here while there is no such sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence as Values
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

from backend.grammar import Compiled, Grammars, GrammarState
from backend.interface import (
    BackendSpec,
    Chunk,
    EngineError,
    Finish,
    Grammar,
    SlotSetup,
    TokenMask,
)
from engine.sequence import Sequence

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True, kw_only=True)
class BoundSequence(Sequence):
    """A sequence with a grammar.

    Its state follows the settled tokens and never runs ahead, so a yield leaves it as it is.
    """

    compiled: Future[Compiled]
    state: GrammarState | None = None  # None: its grammar is not there yet
    waits: bool = True

    @property
    def following(self) -> GrammarState:
        """The state of a sequence that was opened."""
        assert self.state is not None, f"sequence {self.submission.id} has no grammar yet"
        return self.state

    def open(self) -> Finish | None:
        """Take the grammar that is compiled. Returns the end of an answer that cannot have it, or
        had all of it before it came here.
        """
        error = self.compiled.exception()
        if error is not None:
            return Finish("error", message=_explain(error))
        state = self.state = self.compiled.result().begin(self.submission.received)
        self.waits = False
        if state.error is not None:
            return Finish("error", message=f"the answer left its grammar: {state.error}")
        return Finish("stop") if state.complete else None

    @property
    def may_end(self) -> bool:
        """Whether the answer is as long as it has to be at least."""
        drawn = len(self.ids) - len(self.submission.prompt)
        return drawn >= self.submission.sampling.min_new_tokens

    def setup(self) -> SlotSetup:
        """When the answer may end is in its masks: the device knows no grammar."""
        return replace(Sequence.setup(self), min_position=0)

    def append(self, tokens: Values[int]) -> tuple[int, Finish | None]:
        """Take settled tokens, and end where only an end token can follow: no step is spent on what
        is certain.
        """
        count, finish = Sequence.append(self, tokens)
        state = self.following
        state.advance(tokens[:count])
        if state.error is not None:
            return 0, Finish("error", message=f"the grammar cannot go on: {state.error}")
        if finish is not None and finish.reason == "stop":
            return count, finish
        return count, Finish("stop") if state.complete else finish


def _explain(error: BaseException) -> str:
    """Why a grammar was not compiled. A defect, of the parser's too, ends one answer alone."""
    if isinstance(error, EngineError):
        return str(error)
    logger.error("a grammar could not be compiled", exc_info=error)
    return f"internal error: the grammar could not be compiled: {type(error).__name__}"


class Constraints:
    """The bound sequences of a scheduler, and the grammars of its engine."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = spec
        self._grammars = Grammars(spec)
        self._sequences: list[BoundSequence] = []  # in order of arrival, until they have ended

    def __bool__(self) -> bool:
        """Whether there is such a sequence."""
        return bool(self._sequences)

    def bind(self, grammar: Grammar, plain: Sequence) -> BoundSequence:
        """`plain`, which is new, with a grammar, whose compilation begins. Ends of text end it
        whatever its request says of them: behind a complete answer nothing else can come.
        """
        sequence = BoundSequence(
            plain.submission,
            plain.number,
            plain.stop_ids.union(self._spec.stop_ids),
            plain.ids,
            plain.limit,
            scored=plain.scored,
            compiled=self._grammars.compile(grammar),
        )
        self._sequences.append(sequence)
        return sequence

    def open_compiled(self, live: Mapping[str, object]) -> list[tuple[BoundSequence, Finish]]:
        """Forget the sequences that are not in `live`, and open those whose grammar has come.
        Returns the ones that end thereby, and how.
        """
        self._sequences = [each for each in self._sequences if each.submission.id in live]
        come = [each for each in self._sequences if each.state is None and each.compiled.done()]
        opened = [(sequence, sequence.open()) for sequence in come]
        return [(sequence, finish) for sequence, finish in opened if finish is not None]

    def wait(self, seconds: float) -> None:
        """Until a grammar has come that is waited for, so long at most."""
        coming = [each.compiled for each in self._sequences if each.state is None]
        if coming:
            wait(coming, seconds, FIRST_COMPLETED)

    def drawing(self, chunks: Values[Chunk]) -> dict[int, BoundSequence]:
        """Those that draw a token in a step, by the index of their chunk."""
        here = {each.here.slot: each for each in self._sequences if each.placement is not None}
        return {
            index: here[chunk.slot]
            for index, chunk in enumerate(chunks)
            if chunk.samples and chunk.slot in here
        }

    def masks(self, bound: Mapping[int, BoundSequence]) -> dict[int, TokenMask]:
        """What the tokens after the settled ones may be, by the index of a chunk, of all sequences
        that stay.
        """
        staying = {index: each for index, each in bound.items() if not each.leaving}
        asked = [(each.following, each.may_end) for each in staying.values()]
        return dict(zip(staying, self._grammars.masks(asked), strict=True))

    def close(self) -> None:
        """Compile nothing more."""
        self._grammars.close()
