"""Our own form of `POST /generate`: one flat object in, lines of JSON out.

    {"id", "text_delta"} ...                          logprobs: of its tokens, where asked for
    {"event": "done", "id", "finish_reason", "usage"}     matched: what a stop was; warnings

Whole (`"stream": false`): `{"id", "text", "finish_reason", "usage"}` with the same extras. When
`prompt` is a list or `n` is more than 1, each line has the `index` of its answer, prompt by prompt
and n by n, and the whole is `{"id", "answers": [{"index", "text", ...}], "usage"}` with the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from api.answers import Answer, Answers, Ask, Piece, Whole
from api.bodies import Texts, in_words_of_the_client, parse_value, refuse_unsupported
from api.errors import ApiError
from api.replies import json_reply, warnings_entry
from api.sampling_fields import GREEDY, SamplingFields, check_answers
from api.service import Service, new_id, owner_of, service_of
from api.streaming import AnswerStream, fold
from backend.interface import NOTHING_MORE, Finish, TokenLogprob, Wants
from backend.tokenizer import Tokenizer

GRAMMARS = ("json_schema", "regex", "ebnf")
WORDS = {"top_logprobs": "logprobs"}


class NativeBody(SamplingFields):
    """The body of a request. Null is the default everywhere."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | Texts
    model: str | None = Field(None, description="one of the names that the model is served under")
    stream: bool | None = Field(None, description="default: true")
    max_new_tokens: int | None = Field(
        None, description="default: MAX_NEW_TOKENS_DEFAULT, clamped to the room in the context"
    )
    min_new_tokens: int | None = None
    seed: int | None = Field(None, description="answer i of n draws from seed + i")
    logprobs: int | None = Field(None, description="most probable tokens beside each one drawn")
    json_schema: Any = Field(None, description="not served yet: refused")
    regex: Any = Field(None, description="not served yet: refused")
    ebnf: Any = Field(None, description="not served yet: refused")

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
    refuse_unsupported({name: (getattr(body, name), None) for name in GRAMMARS})
    service.check_model(body.model)
    with in_words_of_the_client(WORDS):
        asks = await _asks(service, body)
    answers = service.open(new_id("gen"), asks, owner_of(request))
    tokenizer = service.model.tokenizer
    if body.stream is not False:
        return AnswerStream(answers, NativeFrames(answers, tokenizer, body.many))
    content = _all(answers, await fold(request, answers), tokenizer, body.many)
    return json_reply(content)


async def _asks(service: Service, body: NativeBody) -> list[Ask]:
    """One for each prompt. What is wrong with the fields is said before a prompt is tokenized."""
    sampling = body.params(GREEDY, body.max_new_tokens, body.min_new_tokens)
    stop = body.stops(service.model.tokenizer)
    wants = body.wants
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    n = body.n or 1
    check_answers(len(texts) * n, "n")
    return [
        Ask(
            prompt,
            sampling,
            stop,
            seed=body.seed,
            n=n,
            wants=wants,
            skip_special_tokens=body.skip_special_tokens is not False,
        )
        for prompt in await service.encode(texts, "prompt")
    ]


class NativeFrames:
    """A line for each piece, and one more for the end of each answer."""

    media_type = "application/x-ndjson"

    def __init__(self, answers: Answers, tokenizer: Tokenizer, many: bool) -> None:
        self._tokenizer = tokenizer
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
        end = _end(answer, piece.finish) | self._warnings
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


def _end(answer: Answer, finish: Finish) -> dict[str, Any]:
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
    }


def _all(
    answers: Answers, wholes: Sequence[Whole], tokenizer: Tokenizer, many: bool
) -> dict[str, Any]:
    """The object that answers a request without a stream."""
    contents = [_whole(each, tokenizer) for each in wholes]
    if not many:
        return {"id": answers.id, **contents[0], **warnings_entry(answers.warnings)}
    usages = [each["usage"] for each in contents]
    return {
        "id": answers.id,
        "answers": [{"index": index, **each} for index, each in enumerate(contents)],
        "usage": {name: sum(usage[name] for usage in usages) for name in usages[0]},
        **warnings_entry(answers.warnings),
    }


def _whole(whole: Whole, tokenizer: Tokenizer) -> dict[str, Any]:
    content = {"text": whole.text, **_end(whole.answer, whole.finish)}
    if whole.answer.live.submission.wants.logprobs:
        content["logprobs"] = _logprobs(whole.logprobs, tokenizer)
    return content


def _logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.table[token].decode(errors="replace")
        return {"token_id": token, "token": text, "logprob": logprob}

    return [
        {**entry(each.token, each.logprob), "top": [entry(*pair) for pair in each.top]}
        for each in logprobs
    ]
