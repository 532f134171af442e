"""Load over HTTP: many requests at once, and when each frame of their answers arrived.

A closed loop has users, each of whom asks again when answered. An open loop has visitors who come
when they come; their latency counts from the moment they meant to ask, so that a server or a client
that falls behind is seen (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Protocol

from bench.answer_stream import AnswerReader, Endpoint
from bench.asks import Ask
from bench.http_connection import Address, Client
from bench.summary import Record


@dataclass(frozen=True, slots=True)
class LoadRun:
    """One run of a load."""

    records: list[Record]
    duration_s: float
    client_cpu_share: float  # of one core, taken by this process: near 1 it measures itself


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks one endpoint of one server. A request that fails is a record with a failure."""

    address: Address
    endpoint: Endpoint
    model: str
    timeout_s: float  # for a whole answer
    progress: Callable[[int], object] = lambda ended: None  # told how many requests have ended

    async def ask(self, client: Client, ask: Ask, submitted: float) -> Record:
        """Ask once. `submitted`: the time.perf_counter() that latencies count from."""
        record = Record(prompt_tokens=0, submitted=submitted)
        reader = AnswerReader(self.endpoint, record)
        body = self.endpoint.body(ask, self.model)
        try:
            await asyncio.wait_for(client.post(self.endpoint.path, body, reader), self.timeout_s)
        except asyncio.TimeoutError:
            reader.end(f"timeout: no end within {self.timeout_s:g} s")
        except OSError as error:
            reader.end(f"connection failed: {error}")
        else:
            reader.end()
        self.progress(1)
        return record


class Load(Protocol):
    """How the requests of a run are spread over time."""

    @property
    def at_once(self) -> int:
        """About how many requests are in flight: as many warm the server up."""

    def as_json(self) -> dict[str, Any]:
        """What it is, for the report."""

    async def run(self, asker: Asker, asks: Sequence[Ask]) -> LoadRun:
        """Ask everything, until everything has ended."""


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many users, each with one request in flight, until none is left."""

    concurrency: int

    @property
    def at_once(self) -> int:
        """Exactly as many as there are users."""
        return self.concurrency

    def as_json(self) -> dict[str, Any]:
        """What it is, for the report."""
        return asdict(self)

    async def run(self, asker: Asker, asks: Sequence[Ask]) -> LoadRun:
        """Ask everything, until everything has ended."""
        waiting = iter(asks)
        return await _measure(self._user(asker, waiting) for _ in range(self.concurrency))

    async def _user(self, asker: Asker, asks: Iterator[Ask]) -> list[Record]:
        client = Client(asker.address)
        records = [await asker.ask(client, ask, time.perf_counter()) for ask in asks]
        client.close()
        return records


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Visitors at random times, independent of each other and of the server (Poisson)."""

    request_rate: float  # a second, on average
    seed: int

    @property
    def at_once(self) -> int:
        """As many as come in a second: how long an answer takes is not known yet."""
        return math.ceil(self.request_rate)

    def as_json(self) -> dict[str, Any]:
        """What it is, for the report."""
        return {"request_rate": self.request_rate}

    def arrivals(self, count: int) -> list[float]:
        """Seconds from the start at which `count` visitors come."""
        draw = random.Random(self.seed)
        return list(accumulate(draw.expovariate(self.request_rate) for _ in range(count)))

    async def run(self, asker: Asker, asks: Sequence[Ask]) -> LoadRun:
        """Ask everything, until everything has ended."""
        start = time.perf_counter()
        times = self.arrivals(len(asks))
        pairs = zip(asks, times, strict=True)
        return await _measure(self._visitor(asker, ask, start + after) for ask, after in pairs)

    async def _visitor(self, asker: Asker, ask: Ask, due: float) -> list[Record]:
        await asyncio.sleep(due - time.perf_counter())
        client = Client(asker.address)
        record = await asker.ask(client, ask, due)
        client.close()
        return [record]


async def _measure(users: Iterable[Coroutine[Any, Any, list[Record]]]) -> LoadRun:
    start, worked = time.perf_counter(), time.process_time()
    lists = await asyncio.gather(*users)
    duration_s, worked = time.perf_counter() - start, time.process_time() - worked
    records = [record for records in lists for record in records]
    return LoadRun(records, duration_s, worked / duration_s)
