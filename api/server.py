"""The ASGI application: `uvicorn api.server:app`.

Settings are read when it starts, not when it is imported, so that a wrong flag is one line.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from api import (
    anthropic_routes,
    cache_explain,
    chat,
    completions,
    embeddings,
    generate,
    loads,
    models,
    operations,
    page,
    responses,
    score,
    tokens,
)
from api.auth import ApiKeyMiddleware, Keys
from api.errors import ERRORS, answer_errors, api_error
from api.lifecycle import Lifecycle
from api.metrics import open_registry
from api.turnstile import Turnstile
from backend.interface import EngineError, Unavailable
from config import ConfigError, Settings, read_settings

ROUTERS = (
    generate.router,
    completions.router,
    chat.router,
    responses.router,
    anthropic_routes.router,
    embeddings.router,
    score.router,
    models.router,
    tokens.router,
    operations.router,
    cache_explain.router,
    loads.router,
    page.router,
)


def build_api(settings: Settings, life: Lifecycle) -> ASGIApp:
    """Every route over one service."""
    api = FastAPI(
        title="mini-sglang", description="LLM inference server", redoc_url=None, responses=ERRORS
    )
    api.state.service = life.service
    api.state.registry = open_registry(life.pool)
    for router in ROUTERS:
        api.include_router(router)
    answer_errors(api, life.statistics.rejected)
    api.state.keys = Keys.of(settings.server)
    api.add_middleware(ApiKeyMiddleware, keys=api.state.keys)
    return Turnstile(api)


class Server:
    """The application and its life. Everything is made in `lifespan.startup`."""

    def __init__(self, settings: Settings | None = None) -> None:
        """`settings` None: read from the environment at the start."""
        self._settings = settings
        self._api: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._api is None:
            error = Unavailable("the server has not started: it needs the lifespan protocol")
            await api_error(error).response(scope)(scope, receive, send)
        else:
            await self._api(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Start, tell how it went in one line, and stop when told."""
        await receive()
        life: Lifecycle | None = None
        try:
            settings = self._settings or read_settings()
            life = Lifecycle(settings)
            self._api = build_api(settings, life)
            await life.start()
        except (EngineError, ConfigError) as error:
            if life is not None:
                await life.stop()
            await send(_message("lifespan.startup.failed", message=str(error)))
            return
        await send(_message("lifespan.startup.complete"))
        try:
            await receive()
        except asyncio.CancelledError:
            return  # the loop ends under us, and engines end with this process
        await life.stop()
        await send(_message("lifespan.shutdown.complete"))


def _message(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, **more}


app = Server()
