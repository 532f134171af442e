"""Answers in SGLang's words: `{text, output_ids, meta_info}`, at any time with all there is so far.

Made for one request by its handler; streamed and whole answers are the same object.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from api.answers import Answer, Ask, Piece, Whole
from api.errors import ApiError
from api.events import DONE, EVENT_STREAM, event
from api.receipts import receipt
from api.replies import SLICE, warnings_entry
from backend.interface import Finish, TokenLogprob
from backend.tokenizer import Tokenizer

# What `finish_reason` has beside its type, of an answer that took so many tokens.
FINISHES: Mapping[str, Callable[[Finish, int], dict[str, Any]]] = {
    "stop": lambda finish, tokens: {"matched": finish.matched},
    "length": lambda finish, tokens: {"length": tokens},
    "abort": lambda finish, tokens: {"message": finish.message or "aborted"},
}


@dataclass(frozen=True, slots=True)
class Telling:
    """What a client is told beside the text, and how often."""

    texts: bool  # of tokens, beside their log-probabilities
    prompt: bool  # its token ids
    receipt: bool
    interval: int  # tokens from one event of a stream to the next
    warnings: Sequence[str]


@dataclass(slots=True)
class Record:
    """One answer, as far as it has come."""

    name: str
    answer: Answer
    ask: Ask
    tokenizer: Tokenizer
    telling: Telling
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[bytes]] = field(default_factory=dict)  # JSON, by names in meta_info
    told: int = 0  # ids that an event has had

    def __post_init__(self) -> None:
        wants = self.ask.wants
        if wants.logprobs:
            self.logprobs = {"input_token_logprobs": [], "output_token_logprobs": []}
        if wants.top:
            self.logprobs |= {"input_top_logprobs": [], "output_top_logprobs": []}
        if wants.prompt_logprobs_from is not None:  # the first one follows nothing
            first = self.ask.prompt[wants.prompt_logprobs_from]
            self._write("input_token_logprobs", [self._entry(first, None)])
            if wants.top:
                self._write("input_top_logprobs", [None])

    def add(self, piece: Piece) -> None:
        """Take in a piece."""
        self.text += piece.text
        self.ids += piece.token_ids
        self._add_logprobs("input", piece.prompt_logprobs)
        self._add_logprobs("output", piece.logprobs)

    async def add_whole(self, whole: Whole) -> None:
        """Take in all of it, slice by slice, so that others have their turn meanwhile."""
        self.text, self.ids = whole.text, whole.token_ids
        for side, logprobs in (("input", whole.prompt_logprobs), ("output", whole.logprobs)):
            for start in range(0, len(logprobs), SLICE):
                self._add_logprobs(side, logprobs[start : start + SLICE])
                await asyncio.sleep(0)

    def _add_logprobs(self, side: str, logprobs: Sequence[TokenLogprob]) -> None:
        if not logprobs:
            return
        entries = [self._entry(each.token, each.logprob) for each in logprobs]
        self._write(f"{side}_token_logprobs", entries)
        if self.ask.wants.top:
            tops = [[self._entry(*pair) for pair in each.top] for each in logprobs]
            self._write(f"{side}_top_logprobs", tops)

    def _write(self, name: str, entries: Sequence[Any]) -> None:
        """Each entry once, though every event repeats those before it."""
        self.logprobs[name].append(orjson.dumps(entries)[1:-1])

    def _entry(self, token: int, logprob: float | None) -> tuple[float | None, int, str | None]:
        text = self.tokenizer.table[token].decode(errors="replace") if self.telling.texts else None
        return logprob, token, text

    @property
    def is_due(self) -> bool:
        """Whether there is enough that no event has had: the first ids go out at once."""
        fresh = len(self.ids) - self.told
        return fresh >= (self.telling.interval if self.told else 1)

    def content(self, finish: Finish | None) -> dict[str, Any]:
        """The object that tells of it; `finish` None: it goes on."""
        answer = self.answer
        self.told = len(self.ids)
        return {
            "text": self.text,
            "output_ids": self.ids,
            "meta_info": {
                "id": self.name,
                "finish_reason": None if finish is None else self._reason(finish),
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "cached_tokens": answer.cached_tokens,
                **{name: _joined(parts) for name, parts in self.logprobs.items()},
                **({} if finish is None else self._last_words()),
            },
            **({"prompt_token_ids": self.ask.prompt} if self.telling.prompt else {}),
        }

    def _reason(self, finish: Finish) -> dict[str, Any]:
        more = FINISHES[finish.reason](finish, self.answer.completion_tokens)
        return {"type": finish.reason, **more}

    def _last_words(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.answer.live.submission.arrival
        return {
            "e2e_latency": seconds,
            **({"receipt": receipt(self.answer)} if self.telling.receipt else {}),
            **warnings_entry(self.telling.warnings),
        }


def _joined(parts: list[bytes]) -> orjson.Fragment:
    """The list whose entries are in `parts`, which becomes one part: the next time is quicker."""
    parts[:] = [b",".join(parts)] if parts else []
    return orjson.Fragment(b"[%b]" % b"".join(parts))


class SglangFrames:
    """An event for each piece."""

    media_type = EVENT_STREAM

    def __init__(self, records: Sequence[Record], many: bool) -> None:
        self._records = records
        self._many = many

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        """No event for a piece that brings nothing, or not enough."""
        record = self._records[answer.index]
        record.add(piece)
        if piece.finish is None and not record.is_due:
            return b""
        return self._event(answer, record.content(piece.finish))

    def failure(self, answer: Answer, error: ApiError) -> bytes:
        """The last event of an answer whose engine failed."""
        return self._event(answer, error.body())

    def end(self) -> bytes:
        return DONE

    def _event(self, answer: Answer, content: dict[str, Any]) -> bytes:
        if self._many:
            content = {**content, "index": answer.index}
        return event(content)
