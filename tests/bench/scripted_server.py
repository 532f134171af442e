"""A server on a real socket that answers each request with what a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(slots=True)
class ScriptedServer:
    """What was asked of it, and where it is."""

    url: str = ""
    paths: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    flying: int = 0  # requests that are being answered
    most: int = 0  # of them at once

    async def serve(
        self, scripts: list[Script], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer one connection: each request with the next script, the last one for ever."""
        self.connections += 1
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
                self.bodies.append(json.loads(await reader.readexactly(length)))
                self.heads.append(head)
                self.paths.append(head.split()[1])
                self.flying += 1
                self.most = max(self.most, self.flying)
                await (scripts.pop(0) if len(scripts) > 1 else scripts[0])(writer)
                self.flying -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client hung up
        finally:
            writer.close()


@asynccontextmanager
async def serving(*scripts: Script) -> AsyncIterator[ScriptedServer]:
    """A server for the time of the block."""
    scripted, left = ScriptedServer(), list(scripts)
    server = await asyncio.start_server(
        lambda reader, writer: scripted.serve(left, reader, writer), "127.0.0.1", 0
    )
    async with server:
        host, port = server.sockets[0].getsockname()
        scripted.url = f"http://{host}:{port}"
        yield scripted


def whole(status: str, body: bytes, *headers: str) -> Script:
    """An answer that is no stream."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", ""]

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write("\r\n".join(lines).encode() + body)

    return script


def stream(*pieces: bytes, pause_s: float = 0.0, complete: bool = True) -> Script:
    """A chunk for each piece. Not `complete`: then the connection is cut."""

    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in pieces:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(pause_s)
        if complete:
            writer.write(b"0\r\n\r\n")
        else:
            writer.transport.abort()

    return script


def lines(*values: object) -> list[bytes]:
    """Our own form: JSON, line by line."""
    return [json.dumps(value).encode() + b"\n" for value in values]


def events(*values: object) -> list[bytes]:
    """Server-sent events, with the closing one."""
    return [*(f"data: {json.dumps(value)}\n\n".encode() for value in values), b"data: [DONE]\n\n"]


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """Token counts in both forms."""
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def native(texts: Sequence[str], completion: int) -> list[bytes]:
    """A good answer of /generate."""
    done = {"event": "done", "id": "a", "finish_reason": "length", "usage": usage(5, completion)}
    return lines(*({"id": "a", "text_delta": text} for text in texts), done)


def completion(texts: Sequence[str], count: int) -> list[bytes]:
    """A good answer of /v1/completions."""
    chunks = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in texts]
    last = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
    return events(*chunks, last, {"choices": [], "usage": usage(5, count)})


def chat(texts: Sequence[str], count: int) -> list[bytes]:
    """A good answer of /v1/chat/completions: the role comes first, without text."""
    said = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    chunks = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None}
        for delta in said
    ]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None}
    return events(*chunks, last, {"choices": [], "usage": usage(5, count)})
