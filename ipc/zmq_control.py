"""The control plane: a socket that answers commands, and `python -m ipc.zmq_control` that asks.

One JSON object in, one out, as ZeroMQ's REQ and REP exchange them. What a command means is its
handler's business; that nothing hostile gets so far, or keeps others waiting, is done here.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import orjson
import zmq
import zmq.asyncio

from backend.interface import StartFailed
from config import ConfigError, read_settings

logger = logging.getLogger(__name__)

MAX_MESSAGE = 64 << 10  # bytes of a command
MAX_READ = 1 << 20  # bytes of an answer, and of a command that is read to be refused; a peer that
# sends more is disconnected
MAX_VERBS = 16  # at work at once
LAST_ANSWERS_MS = 100  # for what has been answered to leave when the socket closes
LOCAL = ("tcp://127.", "tcp://[::1]:", "ipc://", "inproc://")

Handler: TypeAlias = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class BadMessage(Exception):
    """What is not answered by a verb. `kind` is what a program reads, the message is for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ControlSocket:
    """Answers commands at one endpoint. A slow one does not keep the next client waiting."""

    def __init__(self, endpoint: str, handle: Handler) -> None:
        self.endpoint = endpoint
        self._handle = handle
        self._context = zmq.asyncio.Context()
        # a ROUTER, because a REP takes one client at a time; clients see no difference
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_READ)
        self._socket.setsockopt(zmq.IPV6, _is_ipv6(endpoint))
        self._verbs: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Take the address. Raises StartFailed; the socket is closed then."""
        try:
            self._socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise StartFailed(
                f"ZMQ_CONTROL_ENDPOINT={self.endpoint} cannot be bound: {error.strerror}: "
                "give another address, or ZMQ_CONTROL=0"
            ) from None
        if not self.endpoint.startswith(LOCAL):
            logger.warning(
                "ZMQ_CONTROL_ENDPOINT=%s asks for no key: whoever reaches it commands this server",
                self.endpoint,
            )

    async def run(self) -> None:
        """Answer until `close`."""
        while not self._socket.closed:
            try:
                parts = await self._socket.recv_multipart()
            except asyncio.CancelledError:
                if self._socket.closed:  # which is how a closing socket ends a pending read
                    return
                raise
            if b"" in parts[1:]:  # the end of the envelope; what has none has nobody to answer
                body = parts.index(b"", 1) + 1
                await self._accept(parts[:body], parts[body:])

    async def _accept(self, envelope: Sequence[bytes], parts: Sequence[bytes]) -> None:
        try:
            command = _json_object(parts, MAX_MESSAGE)
            if len(self._verbs) >= MAX_VERBS:
                raise BadMessage("busy", f"{MAX_VERBS} commands are under way: try again later")
        except BadMessage as error:
            await self._send_error(envelope, error.kind, str(error))
            return
        verb = asyncio.create_task(self._answer(envelope, command))
        self._verbs.add(verb)
        verb.add_done_callback(self._verbs.discard)

    async def _answer(self, envelope: Sequence[bytes], command: dict[str, Any]) -> None:
        try:
            answer = orjson.dumps(await self._handle(command))
            await self._socket.send_multipart([*envelope, answer])
        except asyncio.CancelledError:
            await self._send_error(envelope, "closing", "the server stops")
            raise
        except Exception as error:  # one command's defect is that command's answer
            logger.exception("a control command failed")
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            await self._send_error(envelope, "internal", cause)

    async def _send_error(self, envelope: Sequence[bytes], kind: str, message: str) -> None:
        answer = orjson.dumps({"error": kind, "message": message})
        await self._socket.send_multipart([*envelope, answer])

    async def close(self) -> None:
        """Give up what is at work and free the address. Called once."""
        for verb in self._verbs:
            verb.cancel()
        await asyncio.gather(*self._verbs, return_exceptions=True)
        self._context.destroy(linger=LAST_ANSWERS_MS)


def _json_object(parts: Sequence[bytes], limit: int) -> dict[str, Any]:
    """The object in the parts of a message, `limit` bytes at most. Raises BadMessage."""
    if len(parts) != 1:
        raise BadMessage("invalid_json", f"one part with a JSON object is wanted, got {len(parts)}")
    if len(parts[0]) > limit:
        raise BadMessage("message_too_large", f"{len(parts[0]):,} bytes: {limit:,} at most")
    try:
        value = orjson.loads(parts[0])
    except orjson.JSONDecodeError as error:
        raise BadMessage("invalid_json", f"a JSON object is wanted: {error}") from None
    if not isinstance(value, dict):
        raise BadMessage("invalid_json", f"a JSON object is wanted, got {type(value).__name__}")
    return value


def _is_ipv6(endpoint: str) -> bool:
    return "[" in endpoint


# The client

DRAIN_WAIT_S = 30.0
FAILED, WRONG_ARGUMENTS, NOBODY, INTERRUPTED = 1, 2, 3, 130  # exit codes


class NoAnswer(Exception):
    """Nobody answered in time, or what answered is not our server."""


def ask(endpoint: str, command: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Send one command and wait `timeout` seconds for its answer.

    Raises NoAnswer with one line, zmq.ZMQError for an endpoint that is none, and
    orjson.JSONEncodeError for what JSON cannot say.
    """
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, _is_ipv6(endpoint))
        socket.connect(endpoint.replace("://*:", "://127.0.0.1:"))  # as a server's flag may say
        socket.send(orjson.dumps(command))
        if not socket.poll(int(timeout * 1000)):
            raise NoAnswer(f"nobody answered at {endpoint} within {timeout:g} s")
        try:
            return _json_object(socket.recv_multipart(), MAX_READ)
        except BadMessage as error:
            raise NoAnswer(f"what answered at {endpoint} is no server of ours: {error}") from None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86_400:
        raise ValueError(text)
    return seconds


def _limit(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


_seconds.__name__, _limit.__name__ = "seconds", "NAME=NUMBER"  # as argparse calls them


def _parser() -> argparse.ArgumentParser:
    """The command line. What is not an option of the client is an argument of the verb."""
    client = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    client.add_argument("--endpoint", help="default: ZMQ_CONTROL_ENDPOINT")
    client.add_argument("--timeout", type=_seconds, metavar="S", help="default: 10")
    parser = argparse.ArgumentParser(
        prog="python -m ipc.zmq_control",
        description="Ask the control plane of a server that runs with ZMQ_CONTROL=1.",
        epilog="Exit code: 0 done, 1 refused or failed, 2 wrong arguments, 3 nobody answered.",
        parents=[client],
    )
    verbs = parser.add_subparsers(dest="cmd", metavar="VERB", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name, help=text, parents=[client], argument_default=argparse.SUPPRESS
        )

    verb("metrics", "totals, rolling averages, requests running and waiting")
    verb("stats", "scheduler, engines, queue, pages, cache")
    verb("health", "whether it serves, and whether work goes on")
    warm = verb("warm", "on every engine: run decode steps, or cache a prefix")
    what = warm.add_mutually_exclusive_group(required=True)
    what.add_argument("--tokens", type=int, metavar="N")
    what.add_argument("--prefix", metavar="TEXT")
    drain = verb("drain", "refuse new requests, let the running ones end")
    drain.add_argument(
        "--wait", type=_seconds, nargs="?", const=DRAIN_WAIT_S, metavar="S", help="for the end"
    )
    verb("resume", "accept requests again")
    pause = verb("pause", "generate nothing until continue")
    pause.add_argument("--mode", choices=("abort", "in_place"), help="default: abort")
    verb("continue", "generate again")
    abort = verb("abort", "end requests")
    whose = abort.add_mutually_exclusive_group(required=True)
    whose.add_argument("--id", help="of one request")
    whose.add_argument("--key", help="all of one API key")
    whose.add_argument("--all", action="store_true", help="of everybody")
    verb("flush", "empty the prefix caches")
    limits = verb("set", "change max_inflight_total, max_inflight_per_engine, max_queued")
    limits.add_argument("limits", type=_limit, nargs="+", metavar="NAME=VALUE")
    level = verb("log_level", "change what the server logs")
    level.add_argument("level", type=str.upper, metavar="LEVEL")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, write the answer to stdout, and say the exit code."""
    options = vars(_parser().parse_args(arguments))
    timeout = options.pop("timeout", 10.0) + options.get("wait", 0.0)
    limits = options.pop("limits", ())
    try:
        endpoint = options.pop("endpoint", None) or read_settings().control.endpoint
        answer = ask(endpoint, {**options, **dict(limits)}, timeout)
    except ConfigError as error:
        return _fail(WRONG_ARGUMENTS, str(error))
    except zmq.ZMQError as error:
        return _fail(WRONG_ARGUMENTS, f"--endpoint {endpoint}: {error.strerror}")
    except orjson.JSONEncodeError as error:
        return _fail(WRONG_ARGUMENTS, f"the arguments cannot be sent: {error}")
    except NoAnswer as error:
        return _fail(NOBODY, str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    sys.stdout.write(orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode() + "\n")
    return FAILED if "error" in answer else 0


def _fail(code: int, message: str) -> int:
    sys.stderr.write(message + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
