"""Requests to the app in its own process: the same routes, checks and answers, and no port.

Called by `api/batch_run.py`.
"""

from __future__ import annotations

import asyncio
import logging

import orjson
from starlette.types import ASGIApp, Message, Scope

from api.errors import api_error

logger = logging.getLogger(__name__)


class Call:
    """One POST, and what was answered."""

    def __init__(self, path: str, body: bytes) -> None:
        self.status = 500  # until it is told
        self.answer = bytearray()
        self._path = path
        self._request: list[Message] = [{"type": "http.request", "body": body}]

    async def make(self, app: ASGIApp) -> None:
        """Ask `app`, and return when the answer is whole."""
        try:
            await app(self._scope(), self._receive, self._send)
        except Exception as error:  # a defect; what it was is for the log
            logger.exception("POST %s failed", self._path)
            if not self.answer:
                self.answer += orjson.dumps(api_error(error).body())

    def _scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
        }

    async def _receive(self) -> Message:
        if self._request:
            return self._request.pop()
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never  # this client does not leave

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.answer += message.get("body", b"")
