"""The items of a response's output while they are said, and the events that tell of them.

Owned by the one who tells the response (`api/responses_telling.py`). Around each delta stand bytes
that were prepared when its item was opened.
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson


class Events:
    """Server-sent events with their numbers, in the manner of `openai.types.responses`."""

    def __init__(self) -> None:
        self.told = 0  # so far

    def next_number(self) -> bytes:
        """Of the event that is about to be told."""
        self.told += 1
        return b"%d" % (self.told - 1)

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event."""
        number, self.told = self.told, self.told + 1
        data = orjson.dumps({"type": kind, **fields, "sequence_number": number})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def head(self, kind: str, **fields: Any) -> bytes:
        """An event up to its number, which comes last."""
        data = orjson.dumps({"type": kind, **fields, "sequence_number": 0})
        return b"event: %b\ndata: %b" % (kind.encode(), data[:-2])  # without `0}`


class OutputItem:
    """One item: it is opened, said piece by piece, and closed."""

    prefix: ClassVar[str]  # of its id
    said: ClassVar[str]  # the name of its events
    place: ClassVar[dict[str, Any]] = {}  # what they say besides

    def __init__(self, events: Events, response: str, index: int) -> None:
        """Number `index` of the response whose id ends with `response`."""
        self.id = f"{self.prefix}_{response}{index:04x}"
        self._events = events
        self._index = index
        self._texts: list[str] = []
        self._before = events.head(f"response.{self.said}.delta", **self._of_this())
        self._after = b"}\n\n"

    @property
    def text(self) -> str:
        """What has been said so far."""
        return "".join(self._texts)

    def content(self) -> dict[str, Any]:
        """The fields of the item that hold what was said."""
        raise NotImplementedError

    def empty(self) -> dict[str, Any]:
        """Likewise, before anything was."""
        return self.content()

    def last_words(self) -> dict[str, Any]:
        """The fields of the event that says all of it."""
        return {"text": self.text}

    def item(self, status: str) -> dict[str, Any]:
        """As the response holds it."""
        return {"id": self.id, "status": status, **self.content()}

    def open(self) -> bytes:
        """The events before the first piece."""
        item = {"id": self.id, "status": "in_progress", **self.empty()}
        return self._item("added", item) + self._part("added")

    def more(self, text: str) -> bytes:
        """One more piece."""
        self._texts.append(text)
        return self._delta(text, self._after)

    def close(self, status: str) -> bytes:
        """The events after the last piece."""
        kind = f"response.{self.said}.done"
        said = self._events.event(kind, **self._of_this(), **self.last_words())
        return said + self._part("done") + self._item("done", self.item(status))

    def _item(self, what: str, item: dict[str, Any]) -> bytes:
        kind = f"response.output_item.{what}"
        return self._events.event(kind, output_index=self._index, item=item)

    def _part(self, what: str) -> bytes:
        """The event of the part that its content has; most have none."""
        return b""

    def _of_this(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._index, **self.place}

    def _delta(self, text: str, after: bytes) -> bytes:
        number = self._events.next_number()
        return b'%b%b,"delta":%b%b' % (self._before, number, orjson.dumps(text), after)


class Call(OutputItem):
    """A function is called."""

    prefix = "fc"
    said = "function_call_arguments"

    def __init__(self, events: Events, response: str, index: int, call_id: str, name: str) -> None:
        super().__init__(events, response, index)
        self._call = {"type": "function_call", "call_id": call_id, "name": name}

    def content(self) -> dict[str, Any]:
        return {**self._call, "arguments": self.text}

    def last_words(self) -> dict[str, Any]:
        return {"name": self._call["name"], "arguments": self.text}


class PartItem(OutputItem):
    """An item whose content is one part of text."""

    place: ClassVar[dict[str, Any]] = {"content_index": 0}

    def part(self) -> dict[str, Any]:
        """What has been said so far."""
        raise NotImplementedError

    def _part(self, what: str) -> bytes:
        kind = f"response.content_part.{what}"
        return self._events.event(kind, **self._of_this(), part=self.part())


class Thought(PartItem):
    """The model's reasoning."""

    prefix = "rs"
    said = "reasoning_text"

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def content(self) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [], "content": [self.part()]}

    def empty(self) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [], "content": []}


class Message(PartItem):
    """The answer's words, with their log-probabilities if they are wanted."""

    prefix = "msg"
    said = "output_text"

    def __init__(self, events: Events, response: str, index: int) -> None:
        super().__init__(events, response, index)
        self._logprobs: list[bytes] = []  # of each delta, as JSON: three events repeat them all
        self._after = b',"logprobs":[]}\n\n'

    def scored(self, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        """One more piece, with the log-probabilities of its tokens."""
        self._texts.append(text)
        written = orjson.dumps(logprobs)
        self._logprobs.append(written[1:-1])
        return self._delta(text, b',"logprobs":%b}\n\n' % written)

    def _all_logprobs(self) -> orjson.Fragment:
        self._logprobs = [b",".join(self._logprobs)] if self._logprobs else []
        return orjson.Fragment(b"[%b]" % b",".join(self._logprobs))

    def part(self) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": self._all_logprobs(),
        }

    def last_words(self) -> dict[str, Any]:
        return {"text": self.text, "logprobs": self._all_logprobs()}

    def content(self) -> dict[str, Any]:
        return {"type": "message", "role": "assistant", "content": [self.part()]}

    def empty(self) -> dict[str, Any]:
        return {"type": "message", "role": "assistant", "content": []}
