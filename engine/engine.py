"""The loop of one engine: take requests, advance the backend, hand out what it brought.

Owned by `LLM`, or by the worker of an engine process; one thread. Whatever fails, each accepted
submission ends with exactly one finish.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from backend.interface import (
    EXPIRED,
    Backend,
    BackendFailed,
    BackendSpec,
    Delta,
    EngineError,
    Finish,
    Load,
    RequestRefused,
    StepOutput,
    Submission,
)
from config import QueueSettings
from engine.waiting_room import LOOK_AHEAD, WaitingRoom

logger = logging.getLogger(__name__)


def in_one_line(error: Exception) -> str:
    """An error that is none of ours, with its kind: torch says it in many lines."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class Engine:
    """A backend with a waiting room in front of it."""

    def __init__(self, backend: Backend, queue: QueueSettings) -> None:
        self._backend = backend
        self._room = WaitingRoom(queue)
        self._live: dict[str, None] = {}  # ids accepted and not finished, in order of arrival
        self._ended: list[Delta] = []  # finishes decided here, to go out with the next step
        self._failure: str | None = None

    @property
    def spec(self) -> BackendSpec:
        return self._backend.spec

    @property
    def idle(self) -> bool:
        """Whether every accepted submission has had its finish."""
        return not self._live

    @property
    def failure(self) -> str | None:
        """One line with the cause, once the backend has failed: nothing more will come of it."""
        return self._failure

    def submit(self, submission: Submission) -> None:
        """Accept a submission.

        Raises RequestRefused, Overloaded or BackendFailed, and then nothing is kept of it.
        """
        if self._failure is not None:
            raise BackendFailed(self._failure)
        if submission.id in self._live:
            raise RequestRefused(f"id {submission.id!r} is in use: choose another", "id")
        self.spec.check(submission)
        now = time.monotonic()
        self._room.check(1, self._free(), now)
        self._room.push(submission, now)
        self._live[submission.id] = None

    def cancel(self, id: str) -> None:
        """End a submission early, with finish "abort". Unknown and ended ids are ignored."""
        if self._room.remove(id):
            self._ended.append(Delta(id, finish=Finish("abort"), cached=0))
        elif id in self._live:
            self._backend.cancel(id)

    def step(self, wait: float = 0.0) -> StepOutput:
        """Do the next piece of work. Blocks for `wait` seconds at most when there is none."""
        now = time.monotonic()
        self._expire(now)
        output = self._advance(now, 0.0 if self._ended else wait)
        output.deltas[:0], self._ended = self._ended, []
        for delta in output.deltas:
            if delta.finish is not None:
                self._live.pop(delta.id, None)
        return output

    def _advance(self, now: float, wait: float) -> StepOutput:
        """Feed and drive the backend. One that failed is left alone: all it had is ended."""
        if self._failure is not None:
            return StepOutput()
        try:
            self._feed(now)
            return self._backend.advance(wait)
        except Exception as error:  # whatever it is, nobody may be left waiting for an answer
            return self._fail(error)

    def _expire(self, now: float) -> None:
        for submission in self._room.expire(now):
            self._ended.append(Delta(submission.id, finish=EXPIRED, cached=0))

    def _feed(self, now: float) -> None:
        """Hand over what the backend has rows for, and a little more."""
        free = self._free()
        while free > 0 and (submission := self._room.next(now)) is not None:
            self._backend.submit(submission)
            free -= 1

    def _free(self) -> int:
        """How many more the backend would take."""
        load = self._backend.load()
        return max(0, self.spec.max_running + LOOK_AHEAD - load.running - load.waiting)

    def _fail(self, error: Exception) -> StepOutput:
        """End everything with an error, and refuse what comes after."""
        self._failure = f"the backend failed: {in_one_line(error)}"
        expected = isinstance(error, EngineError)  # else it is a defect, and the trace is wanted
        logger.error(self._failure, exc_info=None if expected else error)
        self._room.clear()
        finish = Finish("error", message=self._failure)
        ended = {delta.id for delta in self._ended}
        return StepOutput([Delta(id, finish=finish) for id in self._live if id not in ended])

    def fileno(self) -> int | None:
        """The backend's descriptor, readable when `step` has something; None: call `step`."""
        return self._backend.fileno()

    def load(self) -> Load:
        """The backend's load, with those that wait here."""
        load = self._backend.load()
        return replace(load, waiting=load.waiting + len(self._room))

    def warm(self, tokens: int) -> int:
        """Run `tokens` decode steps for nobody. Returns the steps run. Called while idle."""
        return self._backend.warm(tokens)

    def prepare(self) -> bool:
        """Use an idle moment for what makes later steps faster. False: nothing is left to do."""
        if self._failure is not None:
            return False
        try:
            return self._backend.prepare()
        except Exception as error:
            self._ended += self._fail(error).deltas
            return False

    def flush(self) -> int:
        """Give up every cached prefix that is not in use. Returns the pages freed."""
        return self._backend.flush()

    def close(self) -> None:
        """Give back the device. Called once."""
        self._backend.close()
