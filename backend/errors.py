"""Errors that cross a seam of this project.

Each message is one line: what was wanted, what was there, what to do.

EngineError
├── StartFailed          the server cannot start: one line with the cause     -> the process ends
│   ├── ModelNotFound    no such folder, file or hub name
│   ├── ModelBroken      a file is missing, truncated or contradicts another
│   └── Unsupported      an architecture, format or option that nothing here runs
├── RequestRefused       this request can never be served; names its field    -> 400
│   ├── TooLong          prompt and answer exceed the context
│   └── NeverFits        prompt and answer exceed all the pages there are
├── Overloaded           the queue is full, try again later                   -> 429, Retry-After
├── Unavailable          nothing is served now: starting, draining, or down   -> 503, Retry-After
└── BackendFailed        the engine cannot go on                              -> 503
    └── DeviceLost       the device is gone, and every running sequence with it
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of every error that crosses a seam of this project."""


class StartFailed(EngineError):
    """The server cannot start.

    The message is one line: what was wanted, what was there, what to do.
    """


class ModelNotFound(StartFailed):
    """No model stands where the settings point."""


class ModelBroken(StartFailed):
    """A model file is missing, truncated, or contradicts another."""


class Unsupported(StartFailed):
    """Nothing here can run what was asked for by name."""


class RequestRefused(EngineError):
    """The request can never be served. `param` names the field at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class TooLong(RequestRefused):
    """Prompt and answer exceed the context of the model."""


class NeverFits(RequestRefused):
    """Prompt and answer exceed the whole page pool."""


class Overloaded(EngineError):
    """The queue is full.

    `queue_depth` requests wait; `retry_after_s` is when there is expected to be room, `est_wait_s`
    when all of them are expected to have left.
    """

    def __init__(
        self, message: str, queue_depth: int, retry_after_s: float, est_wait_s: float
    ) -> None:
        super().__init__(message)
        self.queue_depth = queue_depth
        self.retry_after_s = retry_after_s
        self.est_wait_s = est_wait_s


class Unavailable(EngineError):
    """Nothing is served now: the engines start, are drained, or are down."""


class BackendFailed(EngineError):
    """The backend cannot go on; its running sequences end with this error."""


class DeviceLost(BackendFailed):
    """The device is gone, and every sequence that ran on it."""


def first_line(error: Exception) -> str:
    """What others say in many lines, in one: the first, or the error's kind where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
