"""Answers that a grammar binds: they wait until it is compiled, and follow it token by token."""

from __future__ import annotations

import logging
from concurrent.futures import Future

from backend.grammar import Compiled, Grammars, GrammarState
from backend.interface import EngineError, Finish, Submission, TokenMask

logger = logging.getLogger(__name__)


class Follower:
    """The way of one answer through its grammar. One owner: its sequence.

    It is told each token when the one behind it is about to be drawn, and so has been told a token
    by the time that it is handed out.
    """

    def __init__(self, grammars: Grammars, submission: Submission) -> None:
        """Begins to compile. Raises ValueError for a submission without a grammar."""
        if submission.sampling.grammar is None:
            raise ValueError(f"submission {submission.id} has no grammar")
        self.compiled: Future[Compiled] = grammars.compile(submission.sampling.grammar)
        self._grammars = grammars
        self._received = submission.received
        self._state: GrammarState | None = None  # None: not opened

    @property
    def waits(self) -> bool:
        """Whether the answer may not start yet."""
        return self._state is None

    def open(self) -> Finish | None:
        """Take the grammar that is compiled. Returns the end of an answer that cannot have it, or
        had all of it before it came here.
        """
        error = self.compiled.exception()
        if error is not None:
            return Finish("error", message=_explain(error))
        state = self._state = self.compiled.result().begin(self._received)
        if state.error is not None:
            return Finish("error", message=f"the answer left its grammar: {state.error}")
        return Finish("stop") if state.complete else None

    def allow(self, last: int | None, may_end: bool) -> TokenMask | None:
        """What may follow `last`, the token drawn before, if there was one. None: the answer is
        over, and nobody wants what is drawn.
        """
        state = self._opened
        if last is not None and not state.complete and state.error is None:
            state.advance([last])
        if state.complete or state.error is not None:
            return None
        (mask,) = self._grammars.masks([(state, may_end)])
        return mask

    def ended(self, finish: Finish | None) -> Finish | None:
        """How the answer ends with the token that was told last, if it does; `finish` is what
        would end it without a grammar.
        """
        state = self._opened
        if state.error is not None:
            return Finish("error", message=f"the grammar cannot go on: {state.error}")
        if finish is not None and finish.reason == "stop":
            return finish
        return Finish("stop") if state.complete else finish

    @property
    def _opened(self) -> GrammarState:
        assert self._state is not None, "the grammar is not there yet"
        return self._state


def _explain(error: BaseException) -> str:
    """Why a grammar was not compiled. A defect, of the parser's too, ends one answer alone."""
    if isinstance(error, EngineError):
        return str(error)
    logger.error("a grammar could not be compiled", exc_info=error)
    return f"internal error: the grammar could not be compiled: {type(error).__name__}"
