"""A pool that does what a test says, and the service over it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from api.service import Service
from backend.interface import BackendSpec, Finish, Load, SamplingParams, Submission, Unavailable
from config import ServerSettings, Settings
from engine.dispatcher import Limits
from engine.live_request import LiveRequest
from engine.multi_device import EnginePool, PauseMode, PoolState, ReplicaStatus
from engine.statistics import Statistics
from engine.supervisor import ReplicaState

SPEC = BackendSpec(
    name="fake",
    model="scripted",
    folder=None,
    vocabulary=260,
    max_model_len=64,
    stop_ids=(257,),
    page_tokens=4,
    pages=32,
    max_running=8,
    max_step_tokens=64,
    depth=1,
    device="cpu",
    dtype="float32",
    attention="none",
)
LOAD = Load(1, 0, 32, 20, 8, 4, 0, 7)


def replica(
    index: int = 0,
    state: ReplicaState = "ready",
    inflight: int = 0,
    last_news: float | None = None,
    load: Load | None = LOAD,
) -> ReplicaStatus:
    """One engine, as whoever looks sees it."""
    return ReplicaStatus(index, "cpu", state, inflight, 0, 4711, load, last_news)


def live(request_id: str, owner: str = "") -> LiveRequest:
    """A request under way."""
    submission = Submission(request_id, (1,), SamplingParams(max_new_tokens=1), seed=0)
    return LiveRequest(submission, request_id, owner, notify=lambda _: None)


@dataclass(eq=False)
class ScriptedPool:
    """What handlers ask of an `EnginePool`. Tests set its fields, and read what was asked of it."""

    state: PoolState = "ready"
    replicas: Sequence[ReplicaStatus] = field(default_factory=lambda: [replica()])
    running: int = 0
    waiting: int = 0
    limits: Limits = field(default_factory=lambda: Limits(0, 0, 0))
    statistics: Statistics = field(default_factory=lambda: Statistics(window=50))
    answer: Finish | None = field(default_factory=lambda: Finish("length"))  # None: none ever comes
    refusal: Exception | None = None  # what `submit` raises
    paused: bool = False
    hangs: bool = False  # what is waited for never ends
    live: list[LiveRequest] = field(default_factory=list)
    asked: list[tuple[object, ...]] = field(default_factory=list)

    @property
    def spec(self) -> BackendSpec:
        if self.state == "starting":
            raise Unavailable("the engines are starting: try again in a moment")
        return SPEC

    async def ready(self) -> BackendSpec:
        return SPEC

    def submit(self, requests: Sequence[LiveRequest]) -> list[str]:
        if self.refusal is not None:
            raise self.refusal
        if self.state != "ready":
            raise Unavailable(f"the pool is {self.state}")
        self.live += requests
        for request in requests if self.answer else ():
            assert self.answer is not None
            request.received += [] if self.answer.reason == "abort" else [65]
            self.end(request, self.answer)
            request.notify(request)
        return []

    def end(self, request: LiveRequest, finish: Finish) -> None:
        if request in self.live:
            self.live.remove(request)
            request.finish = finish

    def abort(self, *, request_id: str | None = None, owner: str | None = None) -> int:
        found = [
            each
            for each in self.live
            if request_id in (None, each.request_id) and owner in (None, each.owner)
        ]
        for request in found:
            self.end(request, Finish("abort"))
            request.notify(request)
        return len(found)

    async def warm(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        self.asked.append(("warm", list(prompt), max_new_tokens))
        return len(self.replicas) * (len(prompt) + max_new_tokens)

    async def flush(self) -> int:
        self.asked.append(("flush",))
        if self.hangs:
            await asyncio.Event().wait()
        return 5

    async def pause(self, mode: PauseMode) -> int:
        self.paused = True
        return self.abort() if mode == "abort" else 0

    async def go_on(self) -> None:
        self.paused = False

    def drain(self) -> None:
        self.state = "draining"

    def resume(self) -> None:
        self.state = "ready"

    async def drained(self, timeout: float) -> bool:
        self.asked.append(("drained", timeout))
        return not self.running


def service_over(pool: ScriptedPool, server: ServerSettings | None = None) -> Service:
    """A service whose model is not there yet."""
    return Service(Settings(server=server or ServerSettings()), cast(EnginePool, pool))


def ready_service(pool: ScriptedPool, server: ServerSettings | None = None) -> Service:
    """A service whose model is there: no files, bytes as tokens."""
    service = service_over(pool, server)
    asyncio.run(service.wait_for_model())
    return service
