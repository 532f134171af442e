"""Keeps one engine running: starts it, watches it, starts it again with growing pauses.

Owned by the pool, one for each replica. What happens is told to the pool, which decides about
requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Literal, Protocol

from backend.interface import BackendSpec, Load, StartFailed
from engine.replica import Replica
from ipc.messages import Step

logger = logging.getLogger(__name__)

ReplicaState = Literal["starting", "ready", "restarting", "down"]

FIRST_PAUSE_S = 0.5  # before a restart; doubled with each failure in a row
MAX_FAILURES = 6  # in a row; then the replica is down
STABLE_S = 60.0  # an engine that served for so long has earned a fresh count
STOP_GRACE_S = 10.0  # for an engine to give back its device


class Watcher(Protocol):
    """Who is told."""

    def engine_phase(self, index: int, name: str, seconds: float) -> None:
        """A phase of the start has ended."""

    def engine_ready(self, index: int, spec: BackendSpec) -> None:
        """The engine serves."""

    def engine_step(self, index: int, step: Step) -> None:
        """The engine brought news."""

    def engine_failed(self, index: int, error: StartFailed) -> None:
        """The engine did not start."""

    def engine_lost(self, index: int, reason: str) -> None:
        """The engine that served is gone, with all that it had."""

    def engine_down(self, index: int) -> None:
        """The replica is given up: it failed too often in a row."""


class Supervisor:
    """One replica and its state."""

    def __init__(self, replica: Replica, watcher: Watcher) -> None:
        self.replica = replica
        self.state: ReplicaState = "starting"
        self.restarts = 0
        self.load: Load | None = None  # as the last step said
        self.last_step: float | None = None  # time.monotonic() of the last step, or of the start
        self._watcher = watcher
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def index(self) -> int:
        """The replica's."""
        return self.replica.plan.index

    def start(self) -> None:
        """Begin to keep it running."""
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            try:
                await self._live_once()
            except Exception as error:  # a defect of ours: nobody may wait for an answer for ever
                logger.exception("engine %d is given up", self.index)
                self._failures += 1
                self.state = "restarting"
                self._watcher.engine_lost(self.index, f"internal error: {error}")
                await self.replica.close(STOP_GRACE_S)
            if self._failures >= MAX_FAILURES:
                self.state = "down"
                self._watcher.engine_down(self.index)
                return
            self.state = "restarting"
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** (self._failures - 1))
            self.restarts += 1

    async def _live_once(self) -> None:
        """One life of an engine, from its start to its end."""
        watcher, index = self._watcher, self.index
        try:
            spec = await self.replica.start(lambda name, s: watcher.engine_phase(index, name, s))
        except StartFailed as error:
            self._failures += 1
            watcher.engine_failed(index, error)
            return
        started = self.last_step = time.monotonic()
        self.state = "ready"
        watcher.engine_ready(index, spec)
        reason = await self.replica.run(self._take)
        served = time.monotonic() - started
        self._failures = 1 if served > STABLE_S else self._failures + 1
        self.state, self.load = "restarting", None
        watcher.engine_lost(index, reason)

    def _take(self, step: Step) -> None:
        self.load = step.load
        self.last_step = time.monotonic()
        self._watcher.engine_step(self.index, step)

    async def close(self) -> None:
        """End the engine."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self.replica.close(STOP_GRACE_S)
