"""Our own form of `POST /generate`: one flat object in, lines of JSON out.

    {"id", "text_delta"} ...                          logprobs: of its tokens, where asked for
    {"event": "done", "id", "finish_reason", "usage"}     more: matched (by stop), receipt, warnings

Whole (`"stream": false`): `{"id", "text", "finish_reason", "usage"}` with the same extras. When
`prompt` is a list or `n` is more than 1, each line has the `index` of its answer, prompt by prompt
and n by n, and the whole is `{"id", "answers": [{"index", "text", ...}], "usage"}` with the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from api.answers import Answer, Answers, Ask, Piece, Whole
from api.bodies import Priority, Salt, Texts, in_words_of_the_client, parse_value
from api.errors import ApiError
from api.events import JSON_LINES
from api.generate_fields import GenerateFields
from api.receipts import receipt
from api.replies import json_reply, warnings_entry, written
from api.sampling_fields import GREEDY, check_answers
from api.service import Service, new_id, open_answers, service_of
from api.streaming import AnswerStream, fold
from backend.interface import NOTHING_MORE, Finish, TokenLogprob, Wants
from backend.tokenizer import Tokenizer

WORDS = {"top_logprobs": "logprobs"}


class NativeBody(GenerateFields):
    """The body of a request. Null is the default everywhere."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | Texts
    model: str | None = Field(None, description="one of the names that the model is served under")
    stream: bool | None = Field(None, description="default: true")
    seed: int | None = Field(None, description="answer i of n draws from seed + i")
    logprobs: int | None = Field(None, description="most probable tokens beside each one drawn")
    priority: Priority | None = Field(None, description="who waits goes by it, higher ones first")
    cache_salt: Salt | None = Field(None, description="prefixes are shared within one salt only")
    receipt: bool | None = Field(None, description="say what each answer took")

    @property
    def many(self) -> bool:
        """Whether the client reads more than one answer."""
        return isinstance(self.prompt, list) or (self.n or 1) > 1

    @property
    def wants(self) -> Wants:
        """Raises RequestRefused."""
        return NOTHING_MORE if self.logprobs is None else Wants(logprobs=True, top=self.logprobs)


async def respond(request: Request, value: dict[str, Any]) -> Response:
    """The answer to a body in this form. Raises ApiError, EngineError or ClientGone."""
    service = service_of(request)
    body = parse_value(value, NativeBody)
    service.check_model(body.model)
    with in_words_of_the_client(WORDS):
        asks = await _asks(service, body)
    answers = open_answers(request, new_id("gen"), asks)
    ends = End(bool(body.receipt))
    tokenizer = service.model.tokenizer
    if body.stream is not False:
        return AnswerStream(answers, NativeFrames(answers, tokenizer, ends, body.many))
    wholes = await fold(request, answers)
    return json_reply(await _all(answers, wholes, tokenizer, ends, body.many))


async def _asks(service: Service, body: NativeBody) -> list[Ask]:
    """One for each prompt. What is wrong with the fields is said before a prompt is tokenized."""
    draft = body.ask(GREEDY, service.model.tokenizer)
    draft = replace(
        draft,
        seed=body.seed,
        wants=body.wants,
        namespace=body.cache_salt or "",
        priority=body.priority or 0,
    )
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    check_answers(len(texts) * draft.n, "n")
    await body.check(draft)
    return [replace(draft, prompt=prompt) for prompt in await service.encode(texts, "prompt")]


class NativeFrames:
    """A line for each piece, and one more for the end of each answer."""

    media_type = JSON_LINES

    def __init__(self, answers: Answers, tokenizer: Tokenizer, ends: End, many: bool) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._warnings = warnings_entry(answers.warnings)
        self._names = [_name(answers, answer, many) for answer in answers.all]
        self._heads = [orjson.dumps(name)[:-1] + b',"text_delta":' for name in self._names]

    def frame(self, answer: Answer, piece: Piece) -> bytes:
        """No line for a piece that says nothing."""
        line = b""
        if piece.logprobs:
            logprobs = orjson.dumps(_logprobs(piece.logprobs, self._tokenizer))
            text = orjson.dumps(piece.text)
            line = b'%b%b,"logprobs":%b}\n' % (self._heads[answer.index], text, logprobs)
        elif piece.text:
            line = b"%b%b}\n" % (self._heads[answer.index], orjson.dumps(piece.text))
        if piece.finish is None:
            return line
        end = self._ends.of(answer, piece.finish) | self._warnings
        return line + self._event("done", answer, end)

    def failure(self, answer: Answer, error: ApiError) -> bytes:
        return self._event("error", answer, error.body())

    def end(self) -> bytes:
        return b""

    def _event(self, event: str, answer: Answer, content: dict[str, Any]) -> bytes:
        line = {"event": event, **self._names[answer.index], **content}
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _name(answers: Answers, answer: Answer, many: bool) -> dict[str, Any]:
    return {"id": answers.id, "index": answer.index} if many else {"id": answers.id}


@dataclass(frozen=True, slots=True)
class End:
    """What an answer's end tells."""

    with_receipt: bool

    def of(self, answer: Answer, finish: Finish) -> dict[str, Any]:
        """How an answer ended, and what it took."""
        more = {"matched": finish.matched, "message": finish.message}
        return {
            "finish_reason": finish.reason,
            **{name: value for name, value in more.items() if value is not None},
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "cached_tokens": answer.cached_tokens,
            },
            **({"receipt": receipt(answer)} if self.with_receipt else {}),
        }


async def _all(
    answers: Answers, wholes: Sequence[Whole], tokenizer: Tokenizer, ends: End, many: bool
) -> dict[str, Any]:
    """The object that answers a request without a stream."""
    contents = [await _whole(each, tokenizer, ends) for each in wholes]
    if not many:
        return {"id": answers.id, **contents[0], **warnings_entry(answers.warnings)}
    usages = [each["usage"] for each in contents]
    return {
        "id": answers.id,
        "answers": [{"index": index, **each} for index, each in enumerate(contents)],
        "usage": {name: sum(usage[name] for usage in usages) for name in usages[0]},
        **warnings_entry(answers.warnings),
    }


async def _whole(whole: Whole, tokenizer: Tokenizer, ends: End) -> dict[str, Any]:
    content = {"text": whole.text, **ends.of(whole.answer, whole.finish)}
    if not whole.answer.live.submission.wants.logprobs:
        return content
    entries = await written(whole.logprobs, lambda some: {"logprobs": _logprobs(some, tokenizer)})
    return content | entries


def _logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.table[token].decode(errors="replace")
        return {"token_id": token, "token": text, "logprob": logprob}

    return [
        {**entry(each.token, each.logprob), "top": [entry(*pair) for pair in each.top]}
        for each in logprobs
    ]
