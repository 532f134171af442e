"""How OpenAI's two routes answer. A stream and a whole answer differ in their framing alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request
from starlette.responses import Response

from api.answers import Answer, Answers, Piece, Whole
from api.bodies import in_words_of_the_client
from api.errors import ApiError
from api.events import DONE, EVENT_STREAM, event
from api.openai_fields import OpenAIFields
from api.replies import json_reply, warnings_entry
from api.service import new_id, owner_of, service_of
from api.streaming import AnswerStream, fold
from backend.interface import Finish

Said = Mapping[str, Any]  # the part of a choice that holds text

MARK = "\0"  # stands in a chunk where text will stand


@dataclass(frozen=True, slots=True)
class Wording:
    """Where the two routes differ in what they say."""

    id_prefix: str
    whole: str  # the name of the object
    chunk: str  # likewise
    all: Callable[[str], Said]  # a finished text
    more: Callable[[str], Said]  # a piece of it
    opening: Said | None  # in a chunk before the first piece; None: there is no such chunk
    closing: Said  # in the chunk with the finish reason


@dataclass(frozen=True, slots=True)
class Reply:
    """The answers of one request, in the words of its route."""

    wording: Wording
    answers: Answers
    model: str
    per_prompt: int  # answers

    def head(self, name: str) -> dict[str, Any]:
        """What every object of this reply begins with."""
        return {
            "id": self.answers.id,
            "object": name,
            "created": self.answers.created,
            "model": self.model,
        }

    def choice(self, index: int, said: Said, finish: Finish | None) -> dict[str, Any]:
        """One answer, or news of it. `finish` None: it goes on."""
        choice = {"index": index, **said, "logprobs": None, "finish_reason": None}
        if finish is not None:
            choice |= {"finish_reason": finish.reason, "matched_stop": finish.matched}
        return choice

    def usage(self) -> dict[str, Any]:
        """Token counts. The answers of one prompt share it: it counts once."""
        everyone = self.answers.all
        first_of_each_prompt = everyone[:: self.per_prompt]
        prompt = sum(answer.prompt_tokens for answer in first_of_each_prompt)
        completion = sum(answer.completion_tokens for answer in everyone)
        cached = sum(answer.cached_tokens for answer in first_of_each_prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """The object that answers a request without `stream`."""
        choices = [
            self.choice(each.answer.index, self.wording.all(each.text), each.finish)
            for each in wholes
        ]
        head = self.head(self.wording.whole)
        return {
            **head,
            "choices": choices,
            "usage": self.usage(),
            **warnings_entry(self.answers.warnings),
        }


class ReplyFrames:
    """A reply as server-sent events. Around each text stand bytes that were prepared once."""

    media_type = EVENT_STREAM

    def __init__(self, reply: Reply, with_usage: bool) -> None:
        self._reply = reply
        self._with_usage = with_usage
        self._going = len(reply.answers.all)
        self._around: dict[int, tuple[bytes, bytes]] = {}  # before and after a text, by choice

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        """The chunks of a piece: the role, text, the finish; each where there is one."""
        index = answer.index
        opening = b"" if index in self._around else self._open(index)
        before, after = self._around[index]
        text = before + orjson.dumps(piece.text) + after if piece.text else b""
        closing = b"" if piece.finish is None else self._close(index, piece.finish)
        return opening + text + closing

    def failure(self, answer: Answer, error: ApiError) -> bytes:
        """Instead of a finish: the error."""
        self._going -= 1
        return event(error.body())

    def end(self) -> bytes:
        """The counts, if they were asked for, and the mark of OpenAI's streams."""
        if not self._with_usage:
            return DONE
        head = self._reply.head(self._reply.wording.chunk)
        return event({**head, "choices": [], "usage": self._reply.usage()}) + DONE

    def _open(self, index: int) -> bytes:
        chunk = self._chunk(index, self._reply.wording.more(MARK))
        before, _, after = event(chunk).rpartition(orjson.dumps(MARK))
        self._around[index] = before, after
        opening = self._reply.wording.opening
        return b"" if opening is None else event(self._chunk(index, opening))

    def _close(self, index: int, finish: Finish) -> bytes:
        self._going -= 1
        chunk = self._chunk(index, self._reply.wording.closing, finish)
        return event(chunk if self._going else chunk | warnings_entry(self._reply.answers.warnings))

    def _chunk(self, index: int, said: Said, finish: Finish | None = None) -> dict[str, Any]:
        reply = self._reply
        choices = [reply.choice(index, said, finish)]
        usage = {"usage": None} if self._with_usage else {}
        return {**reply.head(reply.wording.chunk), "choices": choices, **usage}


async def respond(
    request: Request,
    fields: OpenAIFields,
    prompts: Sequence[Sequence[int]],
    warnings: Sequence[str],
    wording: Wording,
) -> Response:
    """Answer `prompts` as `fields` ask. Raises ApiError, Overloaded, Unavailable, BackendFailed."""
    service = service_of(request)
    with in_words_of_the_client(fields.words):
        asks = fields.asks(prompts, service.model.defaults)
        answers = service.open(new_id(wording.id_prefix), asks, owner_of(request), warnings)
    reply = Reply(wording, answers, service.model.names[0], fields.answers_per_prompt)
    if fields.stream:
        return AnswerStream(answers, ReplyFrames(reply, fields.wants_usage))
    body = reply.whole(await fold(request, answers))
    return json_reply(body)
