"""How Anthropic's answers are told: a message made of blocks, in one object or event by event.

Ear.hear(piece) -> Teller -> Opened, Grown, Closed ... -> frames of a stream
                                                       -> the whole message, their fold
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeAlias

import orjson
from pydantic_core import from_json

from api.answers import Answer, Answers, Piece, Whole
from api.errors import ApiError
from api.events import EVENT_STREAM
from api.hearing import Ear
from api.receipts import receipt
from api.replies import warnings_entry
from api.speech import CallArguments, CallStart, Saying
from backend.interface import Finish

MARK = "\0"  # stands in an event where text will stand


@dataclass(frozen=True, slots=True)
class Opened:
    """A block begins; it grows, and is closed before the next one begins."""

    block: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Grown:
    """The block that is open has become longer by `text`."""

    kind: str  # of the delta: one of GROWTHS
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The block that was open is complete."""


News: TypeAlias = Opened | Grown | Closed

# What may grow, by what its delta is called: where the delta holds the text, and the block.
GROWTHS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
    "input_json_delta": ("partial_json", "input"),
}
EMPTY_TEXT = {"type": "text", "text": ""}
EMPTY_THINKING = {"type": "thinking", "thinking": "", "signature": ""}


@dataclass(slots=True)
class Teller:
    """Makes blocks of what one answer says. At most one is open."""

    shows_thoughts: bool = True
    _open: str | None = None  # the type of the block that is open
    _thoughts: Any = field(default_factory=lambda: blake2b(digest_size=16))  # of the open block

    def tell(self, said: Iterable[Saying]) -> list[News]:
        """The news in what was said."""
        news: list[News] = []
        for each in said:
            if isinstance(each, CallStart):
                block = {"type": "tool_use", "id": each.id, "name": each.name, "input": {}}
                news += [*self.end(), Opened(block)]
                self._open = "tool_use"
            elif isinstance(each, CallArguments):
                news.append(Grown("input_json_delta", each.json))
            elif each.thought:
                news += self._turn_to(EMPTY_THINKING)
                self._thoughts.update(each.text.encode())
                if self.shows_thoughts:
                    news.append(Grown("thinking_delta", each.text))
            else:
                news += [*self._turn_to(EMPTY_TEXT), Grown("text_delta", each.text)]
        return news

    def end(self) -> list[News]:
        """Close the block that is open."""
        closing: list[News] = [] if self._open is None else [Closed()]
        if self._open == "thinking":
            # Clients drop thoughts that nobody signed. It is a checksum, and nobody verifies it.
            closing.insert(0, Grown("signature_delta", self._thoughts.hexdigest()))
            self._thoughts = blake2b(digest_size=16)
        self._open = None
        return closing

    def _turn_to(self, block: Mapping[str, Any]) -> list[News]:
        """Let a block of this type be open."""
        if self._open == block["type"]:
            return []
        news = [*self.end(), Opened(block)]
        self._open = block["type"]
        return news


def fold(news: Iterable[News]) -> list[dict[str, Any]]:
    """The blocks that news tell of."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for each in news:
        if isinstance(each, Opened):
            blocks.append(dict(each.block))
            arguments = ""
        elif isinstance(each, Closed):
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = input_of(arguments)
        elif each.kind == "input_json_delta":
            arguments += each.text
        else:
            _, name = GROWTHS[each.kind]
            blocks[-1][name] += each.text
    return blocks


def input_of(arguments: str) -> dict[str, Any]:
    """The object that a call's arguments are; of an answer that was cut what had been said."""
    try:
        found = from_json(arguments, allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request, in the words of its route."""

    answers: Answers
    ear: Ear
    model: str
    shows_thoughts: bool
    with_receipt: bool

    @property
    def answer(self) -> Answer:
        """The only one."""
        return self.answers.all[0]

    def usage(self) -> dict[str, Any]:
        """Token counts so far. Anthropic's input_tokens are without those that the cache had."""
        answer = self.answer
        return {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": answer.cached_tokens,
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self.ear.reasoning_tokens},
        }

    def message(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The message before anything was said."""
        return {
            "id": self.answers.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
            **warnings_entry(self.answers.warnings),
        }

    def ending(self, finish: Finish) -> dict[str, Any]:
        """Why the message ends."""
        matched = finish.matched if isinstance(finish.matched, str) else None
        reason = "max_tokens" if finish.reason == "length" else "end_turn"
        if matched is not None:
            reason = "stop_sequence"
        elif finish.reason == "stop" and self.ear.calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": matched}

    def receipt(self) -> dict[str, Any]:
        """The entry of an answer that says what it took, if that was asked for."""
        return {"receipt": receipt(self.answer)} if self.with_receipt else {}

    def whole(self, whole: Whole) -> dict[str, Any]:
        """The object that answers a request without `stream`. Raises ApiError for an abort."""
        if whole.finish.reason == "abort":
            raise aborted(whole.finish)
        teller = Teller(self.shows_thoughts)
        said = self.ear.hear(Piece(whole.text, whole.token_ids, whole.finish))
        content = fold([*teller.tell(said), *teller.end()])
        ending = {"content": content, **self.ending(whole.finish)}
        return {**self.message(self.usage()), **ending, **self.receipt()}


def aborted(finish: Finish) -> ApiError:
    """Anthropic's messages know no such end, so the answer is an error.

    It is not to be asked for again: whoever ended it meant it.
    """
    message = finish.message or "the request was aborted"
    headers = {"x-should-retry": "false"}
    return ApiError(503, message, "server_error", code="aborted", headers=headers)


def event(content: Mapping[str, Any]) -> bytes:
    """An event with its name, as Anthropic frames it."""
    return b"event: %b\ndata: %b\n\n" % (content["type"].encode(), orjson.dumps(content))


class ReplyFrames:
    """A reply as events. Around each piece of text stand bytes that were prepared once a block."""

    media_type = EVENT_STREAM

    def __init__(self, reply: Reply, request_id: str) -> None:
        self._reply = reply
        self._request_id = request_id
        self._teller = Teller(reply.shows_thoughts)
        self._started = False
        self._index = -1  # of the block that is open, or was last
        self._around: dict[str, tuple[bytes, bytes]] = {}  # a delta's text, by kind, in this block

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        """The events of a piece, and with the last one the end of the message."""
        start = b"" if self._started else self._start()
        told = self._teller.tell(self._reply.ear.hear(piece))
        if piece.finish is None:
            return start + self._events(told)
        told += self._teller.end()
        if piece.finish.reason == "abort":
            return start + self._events(told) + self.failure(answer, aborted(piece.finish))
        return start + self._events(told) + self._end(piece.finish)

    def failure(self, answer: Answer, error: ApiError) -> bytes:
        """Instead of an end: the error."""
        return event(error.anthropic_body(self._request_id))

    def end(self) -> bytes:
        """The message has ended already."""
        return b""

    def _start(self) -> bytes:
        self._started = True
        usage = {**self._reply.usage(), "output_tokens": 0}  # as of this moment
        return event({"type": "message_start", "message": self._reply.message(usage)})

    def _end(self, finish: Finish) -> bytes:
        delta = {
            "type": "message_delta",
            "delta": self._reply.ending(finish),
            "usage": self._reply.usage(),
            **self._reply.receipt(),
        }
        return event(delta) + event({"type": "message_stop"})

    def _events(self, news: Sequence[News]) -> bytes:
        return b"".join([self._event(each) for each in news])

    def _event(self, news: News) -> bytes:
        if isinstance(news, Grown):
            before, after = self._around.get(news.kind) or self._prepare(news.kind)
            return before + orjson.dumps(news.text) + after
        if isinstance(news, Closed):
            return event({"type": "content_block_stop", "index": self._index})
        self._index += 1
        self._around = {}
        start = {"type": "content_block_start", "index": self._index, "content_block": news.block}
        return event(start)

    def _prepare(self, kind: str) -> tuple[bytes, bytes]:
        name, _ = GROWTHS[kind]
        delta = {"type": kind, name: MARK}
        content = {"type": "content_block_delta", "index": self._index, "delta": delta}
        before, _, after = event(content).rpartition(orjson.dumps(MARK))
        self._around[kind] = before, after
        return before, after
