"""The three streams that a server may be asked for, and the reader that turns one into a Record.

Every frame is parsed: it costs 1 us, less than searching it for the marks of the few that matter,
and a frame without text is never taken for a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from bench.asks import Ask, Prompt
from bench.summary import Record

Frame = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way to ask for an answer, and what its frames look like."""

    path: str
    prompt: Callable[[Prompt], dict[str, Any]]  # its fields of the body
    length: str  # the field for the number of new tokens
    compatible: bool  # with OpenAI: a model is named, and token counts are asked for
    mark: bytes  # what a line that holds a frame begins with
    text: Callable[[Frame], str | None]  # that a frame brings
    finish: Callable[[Frame], str | None]  # why the answer ended, in the frame that says it

    def body(self, ask: Ask, model: str) -> bytes:
        """Of the request, as JSON."""
        fields = {
            **self.prompt(ask.prompt),
            self.length: ask.new_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
            "stream": True,
        }
        if ask.ignore_eos:
            fields["ignore_eos"] = True  # not sent otherwise: OpenAI's API does not know it
        if self.compatible:
            fields |= {"model": model, "stream_options": {"include_usage": True}}
        return orjson.dumps(fields)


def _choice(frame: Frame) -> Frame:
    choices = frame.get("choices") or [{}]  # none beside the token counts
    choice: Frame = choices[0]
    return choice


def _said(frame: Frame) -> str | None:
    delta = _choice(frame).get("delta") or {}
    return delta.get("content") or delta.get("reasoning_content")


ENDPOINTS: dict[str, Endpoint] = {
    "generate": Endpoint(
        path="/generate",
        prompt=lambda prompt: {"prompt": prompt},
        length="max_new_tokens",
        compatible=False,
        mark=b"",
        text=lambda frame: frame.get("text_delta"),
        finish=lambda frame: frame.get("finish_reason"),
    ),
    "chat": Endpoint(
        path="/v1/chat/completions",
        prompt=lambda prompt: {"messages": [{"role": "user", "content": prompt}]},
        length="max_tokens",
        compatible=True,
        mark=b"data:",
        text=_said,
        finish=lambda frame: _choice(frame).get("finish_reason"),
    ),
    "completions": Endpoint(
        path="/v1/completions",
        prompt=lambda prompt: {"prompt": prompt},
        length="max_tokens",
        compatible=True,
        mark=b"data:",
        text=lambda frame: _choice(frame).get("text"),
        finish=lambda frame: _choice(frame).get("finish_reason"),
    ),
}
SHOWN = 200  # characters of what nobody understands
CLOSING = b"[DONE]"  # the last frame of a compatible stream


class AnswerReader:
    """Listens to one answer and fills its record.

    Whatever is wrong becomes the record's failure: the cause, a colon, and what is known of it.
    """

    def __init__(self, endpoint: Endpoint, record: Record) -> None:
        self._endpoint = endpoint
        self._record = record
        self._status = 0
        self._rest = b""  # of a line whose end is to come; where there is no stream, the whole body
        self._finish: str | None = None
        self._closed = False  # the frame that says so has come

    def begin(self, status: int) -> None:
        """The head has arrived."""
        self._status = status

    def feed(self, piece: bytes, now: float) -> None:
        """A part of the body was read at `now`. Frames that were read at once arrived together."""
        record = self._record
        record.ended = now
        self._rest += piece
        if self._status != 200:
            return
        *lines, self._rest = self._rest.split(b"\n")
        frames = sum([self._brings_text(line) for line in lines])
        if frames and record.arrivals and record.arrivals[-1][0] == now:
            frames += record.arrivals.pop()[1]
        if frames:
            record.arrivals.append((now, frames))

    def end(self, lost: str | None = None) -> None:
        """Nothing more comes. `lost`: why, if the server did not end the answer."""
        record = self._record
        if lost is not None or record.ended is None:
            record.ended = time.perf_counter()
        record.failure = record.failure or lost or self._fault()

    def _brings_text(self, line: bytes) -> bool:
        """Take in a line of the stream; whether it is a frame with text."""
        mark = self._endpoint.mark
        frame = line[len(mark) :].strip()
        if not frame or not line.startswith(mark):  # between frames, or a comment
            return False
        if frame == CLOSING:
            self._closed = True
            return False
        try:
            return self._take(orjson.loads(frame))
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
            self._record.failure = f"broken frame: {frame[:SHOWN].decode(errors='replace')}"
            return False

    def _take(self, frame: Frame) -> bool:
        record = self._record
        if usage := frame.get("usage"):
            record.prompt_tokens = usage["prompt_tokens"]
            record.counted_tokens = usage["completion_tokens"]
            record.cached_tokens = cached_tokens(usage)
        if error := frame.get("error"):
            record.failure = f"error event{_explain(error)}"
        if frame.get("event") == "done":
            self._closed = True
        self._finish = self._endpoint.finish(frame) or self._finish
        return bool(self._endpoint.text(frame))

    def _fault(self) -> str | None:
        """What an answer that came to its end lacks."""
        if self._status != 200:
            return f"HTTP {self._status}{_explain(_error_of(self._rest))}"
        if not self._closed:
            return "cut short: the stream ended without its last frame"
        if self._finish in ("abort", "error"):
            return f"finish {self._finish}: the server gave the answer up"
        if self._record.counted_tokens is None:
            return "no token counts: the stream ended without a usage"
        return None


def cached_tokens(usage: Frame) -> int:
    """Prompt tokens answered by a cache, as either form of a usage says it."""
    details = usage.get("prompt_tokens_details") or {}
    return usage.get("cached_tokens") or details.get("cached_tokens") or 0


def _error_of(body: bytes) -> Any:
    """The error object of a refusal; of a body in another form, its text."""
    try:
        return orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return " ".join(body.decode(errors="replace").split())[:SHOWN] or "an empty body"


def _explain(error: Any) -> str:
    """What follows the cause: " code: message"."""
    if not isinstance(error, dict):
        return f": {error}"
    code = error.get("code") or error.get("type")
    return f"{f' {code}' if code else ''}: {error.get('message')}"
