"""A control socket at work, and somebody who talks to it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import zmq
import zmq.asyncio

from ipc.zmq_control import ControlSocket, Handler

DEADLINE_S = 10.0


def free_endpoint() -> str:
    """A free address of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


async def echo(command: dict[str, Any]) -> dict[str, Any]:
    return {"ok": True, "command": command}


@asynccontextmanager
async def serving(endpoint: str, handle: Handler = echo) -> AsyncIterator[ControlSocket]:
    """A socket that answers until the end of the block; its loop then ends by itself."""
    control = ControlSocket(endpoint, handle)
    control.start()
    task = asyncio.create_task(control.run())
    try:
        yield control
    finally:
        await control.close()
        await asyncio.wait_for(task, DEADLINE_S)


class Peer:
    """Somebody at the other end who sends whatever it likes."""

    def __init__(self, endpoint: str, kind: int = zmq.REQ) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(kind)
        self._socket.connect(endpoint)

    async def send(self, *parts: bytes) -> None:
        await self._socket.send_multipart(parts)

    async def receive(self) -> list[bytes]:
        return await asyncio.wait_for(self._socket.recv_multipart(), DEADLINE_S)

    async def ask(self, *parts: bytes) -> dict[str, Any]:
        await self.send(*parts)
        (answer,) = await self.receive()
        return dict(json.loads(answer))

    def close(self) -> None:
        self._context.destroy(linger=0)


@asynccontextmanager
async def peer(endpoint: str, kind: int = zmq.REQ) -> AsyncIterator[Peer]:
    other = Peer(endpoint, kind)
    try:
        yield other
    finally:
        other.close()
