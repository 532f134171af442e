"""The token plane: one connection between the front and an engine, for one life of that engine.

A unix socket in a directory of its own, which nobody else may enter and no other start can meet.
Once connected the socket needs no name: the engine takes the directory away, so that nothing is
left behind, however the two processes end. Neither side ever blocks in `send`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import zmq

from backend.interface import StartFailed
from ipc.messages import (
    EngineMessage,
    FrontMessage,
    decode_from_engine,
    decode_from_front,
    encode,
)

LONGEST_BASE = 70  # bytes: the path of a unix socket has room for about 100
CONNECT_TIMEOUT_S = 10.0  # the front listens before it starts an engine
SETTLE_TIMEOUT_S = 1.0  # for what an ended process has sent and nobody has read yet
FLUSH_TIMEOUT_S = 2.0  # for the last words of an engine


def make_endpoint() -> str:
    """A fresh endpoint in a fresh directory, which only this user may enter."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > LONGEST_BASE:
        base = "/tmp"
    return f"ipc://{tempfile.mkdtemp(prefix='minisgl-', dir=base)}/engine"


def remove_endpoint(endpoint: str) -> None:
    """Take away an endpoint's name and its directory, if they are still there."""
    path = Path(endpoint.removeprefix("ipc://"))
    with suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


class EngineLink:
    """The front's side. Made and used on the event loop."""

    def __init__(self) -> None:
        self.endpoint = make_endpoint()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._lost: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._ended = False
        self._stirred = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._both: list[zmq.Socket[bytes]] = [self._socket, self._lost]
        for socket in self._both:
            self._loop.add_reader(socket.fileno(), self._stir, socket)
        try:
            self._socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(f"{self.endpoint}: {error}") from None

    def _stir(self, socket: zmq.Socket[bytes]) -> None:
        # a socket's descriptor stays readable until the socket is asked: the loop would spin
        socket.get(zmq.EVENTS)
        self._stirred.set()

    def send(self, message: FrontMessage) -> None:
        """Send to the engine, once it has been heard. What is for one that is gone is dropped:
        that it is gone `receive` says.
        """
        with suppress(zmq.Again):
            self._socket.send(encode(message), zmq.DONTWAIT)
        self._stirred.set()  # sending may have eaten the descriptor's sign that something came

    async def receive(self) -> list[EngineMessage]:
        """All that has come; waits for the first.

        Empty once the process has ended (see `end`) and all that it sent was received, or when the
        link is closed. Gives the loop a turn in any case, so that an engine which is faster than
        the front makes longer lists and starves nobody.
        """
        await asyncio.sleep(0)
        await self._until(lambda: self._ended or has_something(self._socket))
        if self._ended:  # the kernel has all that was sent, we may not have read it yet
            with suppress(asyncio.TimeoutError):
                lost = self._until(lambda: has_something(self._lost))
                await asyncio.wait_for(lost, SETTLE_TIMEOUT_S)
        return [decode_from_engine(frame) for frame in frames(self._socket)]

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._stirred.clear()
            await self._stirred.wait()

    def end(self) -> None:
        """The engine's process has ended: nothing more will be sent."""
        self._ended = True
        self._stirred.set()

    def close(self) -> None:
        """Let go of the connection, and of its directory if no engine ever came."""
        self._socket.disable_monitor()
        for socket in self._both:
            self._loop.remove_reader(socket.fileno())
            socket.close(linger=0)
        remove_endpoint(self.endpoint)
        self.end()


class FrontLink:
    """The engine's side. One thread, no event loop."""

    def __init__(self, endpoint: str) -> None:
        """Connect, and take the endpoint's directory away.

        Raises StartFailed when nobody listens there.
        """
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        connected = self._socket.get_monitor_socket(zmq.EVENT_CONNECTED)
        self._socket.connect(endpoint)
        found = connected.poll(int(CONNECT_TIMEOUT_S * 1000))
        self._socket.disable_monitor()
        connected.close()
        if not found:
            self._context.destroy(linger=0)
            raise StartFailed(f"nobody listens at {endpoint}: an engine is started by its server")
        remove_endpoint(endpoint)

    def send(self, message: EngineMessage) -> None:
        """Send."""
        self._socket.send(encode(message))

    def poll(self, timeout_s: float, also_fd: int | None = None) -> bool:
        """Wait until a message has come or the descriptor is readable, but no longer. Whether one
        is.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if also_fd is not None:
            poller.register(also_fd, zmq.POLLIN)
        return bool(poller.poll(int(timeout_s * 1000)))

    def receive(self) -> list[FrontMessage]:
        """All that has come. Never waits."""
        return [decode_from_front(frame) for frame in frames(self._socket)]

    def close(self) -> None:
        """Send what is still to be sent, and let go."""
        self._context.destroy(linger=int(FLUSH_TIMEOUT_S * 1000))


def has_something(socket: zmq.Socket[bytes]) -> bool:
    """Whether `frames` would give something, or nothing ever more."""
    return socket.closed or bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)


def frames(socket: zmq.Socket[bytes]) -> list[bytes]:
    """All that can be read at once."""
    read: list[bytes] = []
    with suppress(zmq.Again):
        while not socket.closed:
            read.append(socket.recv(zmq.DONTWAIT))
    return read
