"""How OpenAI's two routes answer. A stream and a whole answer differ in their framing alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request
from starlette.responses import Response

from api.answers import Answer, Answers, Ask, Piece, Whole
from api.bodies import in_words_of_the_client
from api.errors import ApiError
from api.events import DONE, EVENT_STREAM, event
from api.openai_choices import Extras, Part, Phrase, Speech, Teller
from api.openai_fields import OpenAIFields
from api.openai_logprobs import Scores
from api.replies import json_reply, warnings_entry
from api.service import new_id, open_answers, service_of
from api.streaming import AnswerStream, fold
from backend.interface import Finish

MARK = "\0"  # stands in a chunk where text will stand
GOING: Part = {"finish_reason": None}  # in place of an end


@dataclass(frozen=True, slots=True)
class Wording:
    """Where the two routes differ in what they say."""

    id_prefix: str
    whole: str  # the name of the object
    chunk: str  # likewise
    more: Phrase  # around a piece of plain text
    opening: Part | None  # in a chunk before the first piece; None: there is no such chunk
    closing: Part  # in the chunk with the finish reason
    prompt_ids_in_choice: bool  # or beside the choices


@dataclass(frozen=True, slots=True)
class Telling:
    """How the answers of one request are told."""

    wording: Wording
    extras: Extras
    speech: Callable[[Answer], Speech]
    scores: Callable[[Answer], Scores] | None  # None: no log-probabilities are wanted
    plain: bool  # the text of a piece is all it says

    @property
    def bare(self) -> bool:
        """Whether chunks hold text and nothing beside it."""
        extras = self.extras
        beside = extras.token_ids or extras.continuous_usage or self.scores is not None
        return self.plain and not beside

    def teller(self, answer: Answer) -> Teller:
        scores = None if self.scores is None else self.scores(answer)
        return Teller(answer, self.speech(answer), scores, self.extras)


class Reply:
    """The answers of one request, in the words of its route."""

    def __init__(self, telling: Telling, answers: Answers, model: str, per_prompt: int) -> None:
        self.telling = telling
        self.wording = telling.wording
        self.answers = answers
        self.tellers = [telling.teller(answer) for answer in answers.all]
        self._model = model
        self._per_prompt = per_prompt  # answers

    def head(self, name: str) -> dict[str, Any]:
        """What every object of this reply begins with."""
        return {
            "id": self.answers.id,
            "object": name,
            "created": self.answers.created,
            "model": self._model,
        }

    def usage(self) -> dict[str, Any]:
        """Token counts. The answers of one prompt share it: it counts once."""
        return usage_of(self.tellers[:: self._per_prompt], self.tellers)

    def prompt_ids(self, answer: Answer, in_choice: bool) -> Part:
        """The ids of a prompt, where they are wanted and this is their place."""
        here = self.telling.extras.token_ids and self.wording.prompt_ids_in_choice == in_choice
        return {"prompt_token_ids": answer.live.submission.prompt} if here else {}

    async def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """The object that answers a request without `stream`."""
        first = self.answers.all[0]
        choices = [
            {
                "index": each.answer.index,
                **await self.tellers[each.answer.index].whole(each),
                **self.prompt_ids(each.answer, in_choice=True),
            }
            for each in wholes
        ]
        return {
            **self.head(self.wording.whole),
            "choices": choices,
            "usage": self.usage(),
            **self.prompt_ids(first, in_choice=False),
            **warnings_entry(self.answers.warnings),
        }


def usage_of(prompts: Sequence[Teller], tellers: Sequence[Teller]) -> dict[str, Any]:
    """Token counts of answers; `prompts`: one of each prompt."""
    prompt = sum(each.answer.prompt_tokens for each in prompts)
    completion = sum(each.answer.completion_tokens for each in tellers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(each.answer.cached_tokens for each in prompts)
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(each.speech.reasoning_tokens for each in tellers)
        },
    }


class ReplyFrames:
    """A reply as server-sent events. Around each text stand bytes that were prepared once."""

    media_type = EVENT_STREAM

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._going = len(reply.answers.all)
        self._more = reply.wording.more
        self._bare = reply.telling.bare
        self._around: dict[int, tuple[bytes, bytes]] = {}  # plain text, by choice
        self._phrases: dict[tuple[int, Phrase], list[bytes]] = {}  # likewise, whatever is said

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        """The chunks of a piece: the role, text, the finish; each where there is one."""
        index = answer.index
        opening = b"" if index in self._around else self._open(answer)
        if self._bare:
            before, after = self._around[index]
            said = before + orjson.dumps(piece.text) + after if piece.text else b""
        else:
            said = self._said(answer, piece)
        closing = b"" if piece.finish is None else self._close(answer, piece.finish)
        return opening + said + closing

    def failure(self, answer: Answer, error: ApiError) -> bytes:
        """Instead of a finish: the error."""
        self._going -= 1
        return event(error.body())

    def end(self) -> bytes:
        """The counts, if they were asked for, and the mark of OpenAI's streams."""
        reply = self._reply
        if not reply.telling.extras.usage:
            return DONE
        head = reply.head(reply.wording.chunk)
        return event({**head, "choices": [], "usage": reply.usage()}) + DONE

    def _said(self, answer: Answer, piece: Piece) -> bytes:
        """One chunk for each thing that a piece says; what stands beside it is in the first."""
        teller = self._reply.tellers[answer.index]
        said, beside = teller.said(piece)
        if not (beside or self._reply.telling.extras.continuous_usage):
            return b"".join([self._phrased(answer, *each) for each in said])
        parts = [phrase(text) for phrase, text in said]
        if beside:
            first, *others = parts or [teller.speech.silence]
            parts = [first | beside, *others]
        return b"".join([event(self._chunk(answer, part)) for part in parts])

    def _phrased(self, answer: Answer, phrase: Phrase, text: str) -> bytes:
        """A chunk that says `text`."""
        key = answer.index, phrase
        if key not in self._phrases:
            self._phrases[key] = self._prepared(answer, phrase)
        return orjson.dumps(text).join(self._phrases[key])

    def _prepared(self, answer: Answer, phrase: Phrase) -> list[bytes]:
        """A chunk without the texts that stand in it."""
        return event(self._chunk(answer, phrase(MARK))).split(orjson.dumps(MARK))

    def _open(self, answer: Answer) -> bytes:
        before, after = self._prepared(answer, self._more)
        self._around[answer.index] = before, after
        reply = self._reply
        in_choice = reply.prompt_ids(answer, in_choice=True)
        opening = self._more("") if in_choice else reply.wording.opening
        if opening is None:
            return b""
        beside = reply.prompt_ids(answer, in_choice=False)
        return event(self._chunk(answer, opening | in_choice) | beside)

    def _close(self, answer: Answer, finish: Finish) -> bytes:
        self._going -= 1
        end = self._reply.tellers[answer.index].end(finish)
        chunk = self._chunk(answer, self._reply.wording.closing, end)
        return event(chunk if self._going else chunk | warnings_entry(self._reply.answers.warnings))

    def _chunk(self, answer: Answer, part: Part, end: Part = GOING) -> dict[str, Any]:
        """News of one answer."""
        reply = self._reply
        logprobs = part.get("logprobs")
        choice = {"index": answer.index, **part, "logprobs": logprobs, **end}
        return {**reply.head(reply.wording.chunk), "choices": [choice], **self._usage(answer)}

    def _usage(self, answer: Answer) -> dict[str, Any]:
        """What a chunk says of token counts: those of its answer, or that others will come."""
        reply = self._reply
        if reply.telling.extras.continuous_usage:
            teller = reply.tellers[answer.index]
            return {"usage": usage_of([teller], [teller])}
        return {"usage": None} if reply.telling.extras.usage else {}


async def respond(
    request: Request,
    fields: OpenAIFields,
    asks: Sequence[Ask],
    warnings: Sequence[str],
    telling: Telling,
) -> Response:
    """Answer what `fields` ask for.

    Raises ApiError, RequestRefused, Overloaded, Unavailable, BackendFailed.
    """
    service = service_of(request)
    id = fields.name or new_id(telling.wording.id_prefix)
    with in_words_of_the_client(fields.words):
        answers = open_answers(request, id, asks, warnings, events=fields.stream)
    reply = Reply(telling, answers, service.model.names[0], fields.answers_per_prompt)
    if fields.stream:
        return AnswerStream(answers, ReplyFrames(reply))
    wholes = await fold(request, answers)
    return json_reply(await reply.whole(wholes))
