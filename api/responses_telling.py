"""How a response is told: as a stream of typed events, whose last one holds the whole answer.

Made for one request by `api/responses.py`. The whole answer is the fold of the same telling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from api.answers import Answer, Piece
from api.errors import ApiError
from api.events import EVENT_STREAM
from api.hearing import Ear
from api.openai_logprobs import ChatShape, Spelling
from api.receipts import receipt
from api.responses_output import Call, Events, Message, OutputItem, Thought
from api.speech import CallArguments, CallStart, Saying
from backend.interface import Finish
from backend.tokenizer import Tokenizer

# finish reason -> what becomes of the response, of the item that it ends in, and the last event
ENDS: Mapping[str, tuple[str, str, str]] = {
    "stop": ("completed", "completed", "response.completed"),
    "length": ("incomplete", "incomplete", "response.incomplete"),
    "abort": ("cancelled", "incomplete", "response.incomplete"),  # there is no event of its own
}


@dataclass(frozen=True, slots=True)
class Told:
    """What a telling is told of its request."""

    name: str  # the id of the response without its prefix
    head: Mapping[str, Any]  # the fields that are known before the first token
    tokenizer: Tokenizer
    with_receipt: bool
    ended: Callable[[dict[str, Any]], None]  # is handed the finished response


class ResponseTelling:
    """One response. The frames of its stream, and its state so far."""

    media_type = EVENT_STREAM

    def __init__(self, told: Told, ear: Ear) -> None:
        self._told = told
        self._ear = ear
        self._events = Events()
        self._items: list[OutputItem] = []
        self._output: list[dict[str, Any]] = []  # the items that are closed
        self._shape = ChatShape(Spelling(told.tokenizer))
        self._scores: list[dict[str, Any]] = []  # of tokens whose text has not come yet
        self.response = self._state("in_progress")

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        """The events of a piece: the beginning, what it says, the end; each where there is one."""
        opening = b"" if self._events.told else self._begin()
        if piece.logprobs:
            self._score(piece)
        said = [self._say(each) for each in self._ear.hear(piece)]
        closing = b"" if piece.finish is None else self._end(answer, piece.finish)
        return b"".join([opening, *said, closing])

    def failure(self, answer: Answer, error: ApiError) -> bytes:
        """The end of a response whose engine failed."""
        closing = self._close("incomplete")
        about = {"code": "server_error", "message": error.message}
        self.response = self._state("failed", usage=self._usage(answer), error=about)
        told = self._events.event("error", **about, param=None)
        return closing + told + self._events.event("response.failed", response=self.response)

    def end(self) -> bytes:
        """The last event says that it is the last."""
        return b""

    def _begin(self) -> bytes:
        return b"".join(
            self._events.event(kind, response=self.response)
            for kind in ("response.created", "response.in_progress")
        )

    def _say(self, saying: Saying) -> bytes:
        """One thing that was heard."""
        if isinstance(saying, CallArguments):
            return self._items[-1].more(saying.json)
        if isinstance(saying, CallStart):
            place = self._events, self._told.name, len(self._items)
            return self._open(Call(*place, saying.id, saying.name))
        kind = Thought if saying.thought else Message
        opening = b"" if self._is_open(kind) else self._open_text(kind)
        return opening + self._more(saying.text)

    def _more(self, text: str) -> bytes:
        """Words or thoughts of the open item. Who wants log-probabilities hears words alone."""
        item, scores = self._items[-1], self._scores
        if isinstance(item, Message) and scores:
            self._scores = []
            return item.scored(text, scores)
        return item.more(text)

    def _is_open(self, kind: type[OutputItem]) -> bool:
        return len(self._items) > len(self._output) and isinstance(self._items[-1], kind)

    def _open_text(self, kind: type[Thought | Message]) -> bytes:
        return self._open(kind(self._events, self._told.name, len(self._items)))

    def _open(self, item: OutputItem) -> bytes:
        """Close the item before, and open this one."""
        closing = self._close("completed")
        self._items.append(item)
        return closing + item.open()

    def _close(self, status: str) -> bytes:
        """Close the item that is open, if there is one."""
        if len(self._items) == len(self._output):
            return b""
        self._output.append(self._items[-1].item(status))
        return self._items[-1].close(status)

    def _end(self, answer: Answer, finish: Finish) -> bytes:
        """An answer that said nothing is an empty message."""
        opening = b"" if self._items else self._open_text(Message)
        status, item_status, kind = ENDS[finish.reason]
        rest = self._more("") if self._scores else b""
        closing = opening + rest + self._close(item_status)
        more: dict[str, Any] = {"usage": self._usage(answer)}
        if status == "completed":
            more["completed_at"] = int(time.time())
        elif status == "incomplete":
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._told.with_receipt:
            more["receipt"] = receipt(answer)
        self.response = self._state(status, **more)
        self._told.ended(self.response)
        return closing + self._events.event(kind, response=self.response)

    def _state(self, status: str, **more: Any) -> dict[str, Any]:
        """The response so far."""
        return {
            **self._told.head,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": list(self._output),
            "usage": None,
            **more,
        }

    def _usage(self, answer: Answer) -> dict[str, Any]:
        read, written = answer.prompt_tokens, answer.completion_tokens
        return {
            "input_tokens": read,
            # What enters the cache costs nothing here, and is not counted.
            "input_tokens_details": {
                "cached_tokens": answer.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": self._ear.reasoning_tokens},
            "total_tokens": read + written,
        }

    def _score(self, piece: Piece) -> None:
        """Note the log-probabilities of its tokens, but for an end token: it has no text."""
        finish, logprobs = piece.finish, piece.logprobs
        matched = finish.matched if finish is not None and finish.reason == "stop" else None
        if piece.token_ids and piece.token_ids[-1] == matched:
            logprobs = logprobs[:-1]
        self._scores += self._shape.lists([(each.token, each) for each in logprobs])["content"]
