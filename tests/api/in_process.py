"""The HTTP surface in one process: a real app and a real engine, and no socket between them.

    async with serve(router, STRICT_FIELDS=1) as server:
        response = await server.client.post("/generate", json={"prompt": "hello"})

The engine runs on the event loop, over the fake backend with the built-in byte tokenizer unless
the flags say otherwise. Streams arrive whole: this transport collects them.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast
from unittest.mock import patch

import httpx
from fastapi import APIRouter, FastAPI

from api.errors import answer_errors
from api.service import Service
from backend.fake_model import BYTE_END, BYTE_VOCABULARY, CONSONANTS, VOWELS, FakeModel
from backend.interface import (
    BackendSpec,
    EngineError,
    Finish,
    RequestRefused,
    StepOutput,
    Unavailable,
)
from config import Settings, read_settings
from engine.cache_history import CacheHistory, Explanation, Question
from engine.engine import Engine
from engine.live_request import LiveRequest
from engine.multi_device import EnginePool, PoolState
from engine.opening import open_backend

MODEL = FakeModel(BYTE_VOCABULARY, BYTE_END, (tuple(CONSONANTS), tuple(VOWELS)))  # what answers


class PoolInProcess:
    """What handlers ask of `EnginePool`, answered by one engine on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.engine = Engine(open_backend(settings.backend), settings.queue)
        self.state: PoolState = "ready"
        self.warnings: list[str] = []  # what `submit` returns
        self.submitted: list[LiveRequest] = []  # everything, in order
        self.failed = False  # the engine, for good
        self.paused = False  # as it is for good
        self._live: dict[str, LiveRequest] = {}
        self._history = CacheHistory()
        self._driver: asyncio.Task[None] | None = None

    @property
    def spec(self) -> BackendSpec:
        return self.engine.spec

    @property
    def waiting(self) -> int:
        return self.engine.load().waiting

    @property
    def running(self) -> int:
        return self.engine.load().running

    async def ready(self) -> BackendSpec:
        return self.engine.spec

    def submit(self, requests: Sequence[LiveRequest]) -> list[str]:
        if self.state != "ready":
            raise Unavailable("the server is draining: try again later")
        for request in requests:
            self.engine.spec.check(request.submission)
            if any(live.name == request.name for live in self._live.values()):
                raise RequestRefused(f"rid {request.request_id!r} is in use", "rid")
        for index, request in enumerate(requests):
            try:
                self.engine.submit(request.submission)
            except EngineError:
                for earlier in requests[:index]:
                    self.engine.cancel(earlier.id)
                raise
        self._live |= {request.id: request for request in requests}
        for request in requests:
            request.replica = 0
        self.submitted += requests
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        return list(self.warnings)

    def end(self, request: LiveRequest, finish: Finish) -> None:
        if request.finish is None:
            request.finish = finish
            self._live.pop(request.id, None)
            self.engine.cancel(request.id)

    def abort(self, *, request_id: str | None = None, owner: str | None = None) -> int:
        found = [
            live
            for live in self._live.values()
            if request_id in (None, live.request_id) and owner in (None, live.owner)
        ]
        for live in found:
            self.end(live, Finish("abort"))
            live.notify(live)
        return len(found)

    def place_of(self, request: LiveRequest) -> tuple[int, float] | None:
        return None

    async def explain(
        self, owner: str, namespace: str, ids: Sequence[int]
    ) -> Sequence[Explanation]:
        now = time.monotonic()
        question = Question(owner, namespace, tuple(ids), self.spec.page_tokens, now)
        return await self._history.explain(question, [0])

    def drain(self) -> None:
        self.state = "draining"

    def resume(self) -> None:
        self.state = "ready"

    async def close(self) -> None:
        """Wait for the engine to be idle. Then every page must be home, unless it has failed."""
        if self._driver is not None:
            await self._driver
        self.engine.flush()
        load = self.engine.load()
        assert self.failed or (load.running, load.waiting) == (0, 0)
        assert self.failed or load.pages_free == load.pages_total
        self.engine.close()

    async def _drive(self) -> None:
        """Run the engine until it is idle. Handlers have their turn between two steps."""
        while not self.engine.idle:
            self._deliver(self.engine.step())
            await asyncio.sleep(0)

    def _deliver(self, output: StepOutput) -> None:
        self._history.told(0, output.entered, output.evicted, time.monotonic())
        for delta in output.deltas:
            live = self._live.get(delta.id)
            if live is None:
                continue
            if delta.prefilled is not None:
                live.prefilled = delta.prefilled
                continue
            if delta.cached is not None:
                self._history.computed(live)
            live.pooled, live.work = delta.pooled, delta.work
            live.received += delta.tokens
            live.logprobs += delta.logprobs
            live.prompt_logprobs += delta.prompt_logprobs
            live.cached = live.cached if delta.cached is None else delta.cached
            live.finish = delta.finish
            if delta.finish is not None:
                del self._live[delta.id]
                self.failed |= delta.finish.reason == "error"
            live.notify(live)


@dataclass(frozen=True, slots=True)
class Server:
    """A server and its client."""

    client: httpx.AsyncClient
    app: FastAPI
    service: Service
    pool: PoolInProcess


@asynccontextmanager
async def serve(*routers: APIRouter, **flags: object) -> AsyncIterator[Server]:
    """A server with the routes of `routers`; `flags` are those of the environment.

    In the end nothing runs any more, and every page is home.
    """
    settings = settings_of(**flags)
    pool = PoolInProcess(settings)
    service = Service(settings, cast(EnginePool, pool))
    await service.wait_for_model()
    app = application(service, *routers)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield Server(client, app, service, pool)
    await pool.close()


def run(router: APIRouter, check: Callable[[Server], Awaitable[None]], **flags: object) -> None:
    """Hand `check` a fresh server."""

    async def served() -> None:
        async with serve(router, **flags) as server:
            await check(server)

    asyncio.run(served())


def post(router: APIRouter, path: str, body: object, **flags: object) -> httpx.Response:
    """The answer of a fresh server to one request; `body` is JSON, or the bytes themselves."""

    async def exchange() -> httpx.Response:
        async with serve(router, **flags) as server:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await server.client.post(path, content=content)

    return asyncio.run(exchange())


def refusal(response: httpx.Response) -> tuple[int, str | None]:
    """The status of an error and the field it names; its form is checked."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert "Traceback" not in error["message"]
    assert error["param"] is None or error["param"] in error["message"]
    return response.status_code, error["param"]


def settings_of(**flags: object) -> Settings:
    """The settings of a process whose environment holds `flags` on top of the fake backend."""
    with patch.dict(
        os.environ, {"BACKEND_IMPL": "fake"} | {name: str(flags[name]) for name in flags}
    ):
        return read_settings()


def application(service: Service, *routers: APIRouter) -> FastAPI:
    """The app of `service`."""
    app = FastAPI()
    app.state.service = service
    for router in routers:
        app.include_router(router)
    answer_errors(app)
    return app
