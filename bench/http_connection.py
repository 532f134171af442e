"""One connection of a load client: a request at a time, its answer handed on as it arrives.

At 20,000 frames a second the client must not become what is measured. A protocol with a C parser
hears of a frame within the callback that read it. That costs half of a stream and a task to read
it (12 against 24 us a frame, on uvloop both), and the time noted is the arrival's.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import SplitResult, urlsplit

import httptools

from backend.interface import RequestRefused
from config import ServerSettings

PORTS = {"http": 80, "https": 443}


def key_of(given: str | None, server: ServerSettings) -> str | None:
    """What a server is asked with: the key that was given, else the first one of API_KEY."""
    if given is None and server.api_key is not None:
        return server.api_key.get_secret_value().split(",")[0].strip()
    return given


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and the key it wants. Raises RequestRefused for what is no address."""

    url: str  # without a slash at its end
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = self.parts
            valid = parts.scheme in PORTS and parts.hostname and parts.port != 0
        except ValueError:  # its port is not a number
            valid = False
        if not valid:
            raise RequestRefused(
                f"{self.url} is no address of a server: give one like http://127.0.0.1:8000",
                "base_url",
            )

    @property
    def parts(self) -> SplitResult:
        """The URL, taken apart."""
        return urlsplit(self.url)

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def post(self, path: str, body: bytes) -> bytes:
        """A whole request with a JSON body."""
        headers = {
            "Host": self.parts.netloc.rpartition("@")[2],
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self.parts.path}{path} HTTP/1.1\r\n{lines}\r\n".encode() + body


class Listener(Protocol):
    """What an answer is handed to."""

    def begin(self, status: int) -> None:
        """The head has arrived."""

    def feed(self, piece: bytes, now: float) -> None:
        """A part of the body, anything from a byte to many frames, was read at `now`, in seconds
        of time.perf_counter(). What was read at once has one time.
        """


class Connection(asyncio.Protocol):
    """Made by `connect`, used until it is closed by either side. One request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._now = 0.0  # when the last data was read
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._listener: Listener | None = None
        self._answered: asyncio.Future[None] | None = None

    @staticmethod
    async def connect(address: Address) -> Connection:
        """Raises OSError."""
        parts = address.parts
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection,
            parts.hostname or "",
            parts.port or PORTS[parts.scheme],
            ssl=parts.scheme == "https" or None,
        )
        return connection

    async def exchange(self, request: bytes, listener: Listener) -> None:
        """Send `request` and hand its answer to `listener`, to its last byte.

        Raises OSError when the connection is lost before. Cancelling closes the connection.
        """
        assert self._transport is not None
        self._listener = listener
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._answered
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._settle(ConnectionError(f"not an HTTP answer: {error}"))

    def connection_lost(self, reason: Exception | None) -> None:
        self.closed = True
        self._settle(ConnectionError("it was closed before the end of the answer"))

    def on_headers_complete(self) -> None:
        if self._listener is not None:
            self._listener.begin(self._parser.get_status_code())

    def on_body(self, piece: bytes) -> None:
        if self._listener is not None:
            self._listener.feed(piece, self._now)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._settle(None)

    def _settle(self, error: Exception | None) -> None:
        answered = self._answered
        if answered is None or answered.done():
            return
        if error is None:
            answered.set_result(None)
        else:
            answered.set_exception(error)


class Client:
    """Asks one thing after another over one connection, and opens it anew when it was closed."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Connection | None = None

    async def post(self, path: str, body: bytes, listener: Listener) -> None:
        """Hand the answer to `listener`, to its last byte. Raises OSError when that fails."""
        if self._connection is None or self._connection.closed:
            self._connection = await Connection.connect(self._address)
        await self._connection.exchange(self._address.post(path, body), listener)

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
