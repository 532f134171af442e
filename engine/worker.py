"""One engine process: `python -m engine.worker --index 0 --endpoint ipc://...`.

Started by `engine/replica.py`, never by hand. It says how its start goes, then takes requests from
the front and sends what each step brought. It lives no longer than the front: stdin is a pipe whose
other end the front holds, and on Linux the kernel watches as well.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from backend.interface import Delta, EngineError, Finish, Load, StartFailed
from config import BackendSettings, ConfigError, QueueSettings, read_settings
from engine.collector import settle_collector
from engine.engine import Engine, in_one_line
from engine.log import start_log
from engine.opening import open_backend
from engine.parent_death import die_with_parent
from engine.process_age import process_age
from ipc.messages import (
    Cancel,
    Failed,
    Flush,
    Flushed,
    Pause,
    Paused,
    Phase,
    Ready,
    Step,
    Submit,
)
from ipc.zmq_data import FrontLink, remove_endpoint

logger = logging.getLogger("engine.worker")  # as a program this module is called __main__

REST_WAIT_S = 1.0  # a signal that comes just before the sleep is seen after it
STEP_WAIT_S = 0.01  # a message may come meanwhile
DEADLINE_WAIT_S = 0.1  # a deadline may pass, without a message


class Worker:
    """The loop between the front and the engine. One thread."""

    def __init__(self, engine: Engine, link: FrontLink) -> None:
        self._engine = engine
        self._link = link
        self._refused: list[Delta] = []  # submissions that ended at once
        self._told: Load | None = None  # what the front knows
        self._at_rest = True
        self._paused = False  # then messages are read, and no step is done
        self._takes: dict[type, Callable[[Any], None]] = {
            Submit: self._submit,
            Cancel: self._cancel,
            Flush: self._flush,
            Pause: self._pause,
        }

    def run(self) -> None:
        """Serve until the backend fails, and say so."""
        while self._engine.failure is None:
            self._wait()
            for message in self._link.receive():
                self._takes[type(message)](message)
            if not self._paused:
                self._step()
        self._link.send(Failed(self._engine.failure))

    def _wait(self) -> None:
        """Sleep while there is nothing to do. A backend that works by itself is waited for
        together with the inbox; one that works in `step` is not kept from it.
        """
        descriptor = self._engine.fileno()
        if self._paused:
            self._link.poll(REST_WAIT_S)
        elif self._at_rest:
            self._rest(descriptor)
        elif descriptor is not None:
            self._link.poll(DEADLINE_WAIT_S, descriptor)

    def _rest(self, descriptor: int | None) -> None:
        """Use the time until something comes, or nothing is left to prepare; then sleep."""
        while self._engine.prepare():
            if self._link.poll(0.0, descriptor):
                return
        self._link.poll(REST_WAIT_S, descriptor)

    def _submit(self, message: Submit) -> None:
        submission = message.submission
        try:
            self._engine.submit(submission)
        except Exception as error:  # whatever it is, it is the answer to this one request
            finish = Finish("error", message=explain(error))
            self._refused.append(Delta(submission.id, finish=finish))

    def _cancel(self, message: Cancel) -> None:
        self._engine.cancel(message.id)

    def _flush(self, message: Flush) -> None:
        self._link.send(Flushed(message.number, self._engine.flush()))

    def _pause(self, message: Pause) -> None:
        self._paused = message.paused
        self._link.send(Paused(message.number))

    def _step(self) -> None:
        """Do a step and send what is new, be it the load alone: the front sees how work ends."""
        output = self._engine.step(STEP_WAIT_S)
        output.deltas[:0], self._refused = self._refused, []
        load = self._engine.load()
        if output.deltas or output.entered or output.evicted or load != self._told:
            self._link.send(Step.of(output, load))
            self._told = load
        # an answer may have ended with a step still in flight, which holds its pages
        self._at_rest = self._engine.idle and not load.running


def explain(error: Exception) -> str:
    """What happened, in one line. The trace of an error that is none of ours is logged."""
    if isinstance(error, (EngineError, ConfigError)):
        return str(error)
    line = in_one_line(error)
    logger.error(line, exc_info=error)
    return line


def open_engine(settings: BackendSettings, link: FrontLink) -> Engine:
    """Load the backend and say that it serves. Raises StartFailed."""
    begun = time.monotonic()
    backend = open_backend(settings)
    settle_collector()
    link.send(Phase("backend", time.monotonic() - begun))
    link.send(Ready(backend.spec))
    return Engine(backend, QueueSettings(max_queued=0))


def live(index: int, link: FrontLink) -> None:
    """Start, serve, and say why it ends."""
    try:
        link.send(Phase("process", process_age()))
        settings = read_settings()
        start_log(settings.log_level, f"engine {index}")
        engine = open_engine(settings.backend, link)
        try:
            Worker(engine, link).run()
        finally:
            engine.close()
    except Exception as error:
        link.send(Failed(explain(error)))


def watch_lifeline(endpoint: str) -> None:
    """End with the front, however it dies: its end of our stdin is closed then.

    A front that died before we look is seen as well, because a closed pipe stays closed.
    """

    def watch() -> None:
        while os.read(0, 1024):
            pass
        remove_endpoint(endpoint)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def main() -> int:
    """Returns 1: an engine has no end of its own but failure. SIGTERM ends it with 0."""
    parser = argparse.ArgumentParser(prog="python -m engine.worker", description=__doc__)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--endpoint", required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front, which decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    watch_lifeline(arguments.endpoint)
    try:
        link = FrontLink(arguments.endpoint)
    except StartFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    # also while the interpreter hangs; not before the link has taken its directory away
    die_with_parent(signal.SIGKILL)
    try:
        live(arguments.index, link)
    finally:
        link.close()
    return 1


if __name__ == "__main__":
    sys.exit(main())
