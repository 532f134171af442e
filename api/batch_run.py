"""A batch job at work: so many requests at a time, each answer written as soon as it is whole.

Called by `api/batch.py`, on the event loop of the engines that it is handed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import orjson
from starlette.types import ASGIApp

from api.batch_call import Call
from api.batch_file import ID_PREFIX, Line, Outcome, Output
from api.errors import refused
from api.service import new_id
from backend.interface import Unavailable
from engine.multi_device import REFUSALS, EnginePool

ATTEMPTS = 3  # at a request whose engine is lost
ENGINE_LOST = 503  # the status of its answer
PAUSE_S = 0.1  # between two looks whether an engine is back
STREAMED = refused("stream is not served in a batch: the answers of its file are whole", "stream")


@dataclass(frozen=True, slots=True)
class Job:
    """Asks `app`, which is over `pool`, and writes to `output`."""

    app: ASGIApp
    pool: EnginePool
    output: Output

    async def run(self, lines: Iterator[Line], concurrency: int) -> None:
        """Answer every line that is not answered yet, `concurrency` at a time.

        Raises Unavailable when all engines are lost for good. Cancelled, it writes nothing more.
        """
        left = (line for line in lines if line.custom_id not in self.output.answered)
        workers = [asyncio.create_task(self._work(left)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, lines: Iterator[Line]) -> None:
        """Answer one line after another; all workers take theirs from the same iterator."""
        for line in lines:
            self.output.write(await self._answer(line))

    async def _answer(self, line: Line) -> Outcome:
        if line.body.get("stream"):
            return _outcome(line, STREAMED.status, orjson.dumps(STREAMED.body()))
        for attempt in range(1, ATTEMPTS + 1):
            call = Call(line.url, orjson.dumps(line.body))
            await call.make(self.app)
            if call.status != ENGINE_LOST or attempt == ATTEMPTS:
                break
            await self._engine_back()
        return _outcome(line, call.status, bytes(call.answer))

    async def _engine_back(self) -> None:
        """Wait until an engine serves. Raises Unavailable when none will."""
        while self.pool.state != "ready":
            if self.pool.state == "down":
                raise Unavailable(REFUSALS["down"])
            await asyncio.sleep(PAUSE_S)


def _outcome(line: Line, status: int, body: bytes) -> Outcome:
    return Outcome(new_id(ID_PREFIX), line.custom_id, new_id("req"), status, body)
