"""Who answers in a chat: what a conversation wants of it, and a server that has it."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, Protocol

from backend.interface import EngineError, RequestRefused, SamplingParams, Unavailable
from bench.answer_stream import CLOSING, ENDPOINTS, SHOWN, cached_tokens
from bench.http_connection import Address
from bench.server_facts import ANSWER_S

Message = Mapping[str, str]  # a role and a content

CHAT = ENDPOINTS["chat"]
MODELS = "/v1/models"
CONNECTIONS: Mapping[str, type[HTTPConnection]] = {"http": HTTPConnection, "https": HTTPSConnection}
AT_FAULT = (400, 413)  # the request itself: it will be refused another time, too
REFUSAL_BYTES = 1 << 16  # that are read
NOT_UNDERSTOOD = (ValueError, LookupError, TypeError, AttributeError)  # JSON, but of another shape


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of an answer and of its prompt."""

    prompt: int
    cached: int  # of the prompt, answered by a cache
    answer: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. None: this one does not say it."""

    text: str
    finish: str | None = None  # why the answer ended
    counts: Counts | None = None  # up to here


class Chat(Protocol):
    """A model that answers conversations."""

    @property
    def title(self) -> str:
        """Which model, and where."""

    def stream(self, messages: Sequence[Message], seed: int | None) -> Generator[Piece, None, None]:
        """Answer piece by piece. Closing the generator cancels the answer.

        Raises RequestRefused for what can never be answered, Unavailable when asking again may
        help, and BackendFailed when nothing will be answered any more.
        """


@dataclass(frozen=True, slots=True)
class RemoteChat:
    """The model of a server that speaks OpenAI's API. Each answer has a connection of its own."""

    address: Address
    model: str
    sampling: SamplingParams  # its temperature and length are sent

    @staticmethod
    def connect(address: Address, sampling: SamplingParams) -> RemoteChat:
        """With the model that the server lists first. Raises Unavailable or RequestRefused."""
        with _asked(address, "GET", MODELS, timeout_s=ANSWER_S) as answer:
            body = answer.read()
        try:
            model = str(json.loads(body)["data"][0]["id"])
        except NOT_UNDERSTOOD:
            raise Unavailable(
                f"{address.url} lists no model at {MODELS}: is this the server's address?"
            ) from None
        return RemoteChat(address, model, sampling)

    @property
    def title(self) -> str:
        return f"{self.model} at {self.address.url}"

    def stream(self, messages: Sequence[Message], seed: int | None) -> Generator[Piece, None, None]:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.sampling.temperature,
            CHAT.length: self.sampling.max_new_tokens,  # null, as the seed may be: not asked for
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # in ASCII: bytes of stdin that are no text become half a surrogate pair, for which UTF-8
        # has no bytes, and which the server refuses
        with _asked(self.address, "POST", CHAT.path, json.dumps(body).encode()) as answer:
            yield from map(_piece, _frames(answer))


@contextmanager
def _asked(
    address: Address,
    method: str,
    path: str,
    body: bytes | None = None,
    timeout_s: float | None = None,
) -> Iterator[HTTPResponse]:
    """The answer to one request, for the time of the block. Leaving it hangs up, and the server
    gives up what it has not sent. Raises RequestRefused or Unavailable.
    """
    parts = address.parts
    connection = CONNECTIONS[parts.scheme](parts.hostname or "", parts.port, timeout=timeout_s)
    with closing(connection):
        try:
            headers = {"Content-Type": "application/json", **address.headers}
            in_bytes = {name: value.encode() for name, value in headers.items()}  # a key in UTF-8
            connection.request(method, parts.path + path, body, in_bytes)
            answer = connection.getresponse()
            if answer.status != 200:
                raise _refusal(address, answer)
        except (OSError, HTTPException, ValueError) as error:  # the last: a key that is no header
            reason = _line(str(error))
            raise Unavailable(f"no server answers at {address.url}: {reason}") from None
        yield answer


def _refusal(address: Address, answer: HTTPResponse) -> EngineError:
    """What an answer that is not the one asked for comes to, in the server's own words."""
    body = answer.read(REFUSAL_BYTES)
    try:
        message = str(json.loads(body)["error"]["message"])
    except NOT_UNDERSTOOD:
        message = body.decode(errors="replace")[:SHOWN]
    line = _line(message) or answer.reason
    if answer.status in AT_FAULT:
        return RequestRefused(line, "messages")
    return Unavailable(f"{address.url} answers {answer.status}: {line}")


def _line(text: str) -> str:
    return " ".join(text.split())


def _frames(lines: HTTPResponse) -> Iterator[bytes]:
    """The frames of a stream. Raises Unavailable when it ends before the closing one."""
    with suppress(OSError, HTTPException):  # one way of being cut among others
        for line in lines:
            frame = line[len(CHAT.mark) :].strip()
            if not frame or not line.startswith(CHAT.mark):  # between frames, or a comment
                continue
            if frame == CLOSING:
                return
            yield frame
    raise Unavailable("the answer was cut off: the stream ended without its last frame")


def _piece(frame: bytes) -> Piece:
    """Raises Unavailable for an error of the server, or what nobody understands."""
    try:
        fields = json.loads(frame)
        if error := fields.get("error"):
            raise Unavailable(f"the answer failed: {error['message']}")
        return Piece(CHAT.text(fields) or "", CHAT.finish(fields), _counts(fields.get("usage")))
    except NOT_UNDERSTOOD:
        shown = frame[:SHOWN].decode(errors="replace")
        raise Unavailable(f"the answer has a broken frame: {shown}") from None


def _counts(usage: Mapping[str, Any] | None) -> Counts | None:
    if not usage:
        return None
    return Counts(usage["prompt_tokens"], cached_tokens(usage), usage["completion_tokens"])
