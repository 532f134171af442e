"""`POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's conversations."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.accepting import accept
from api.anthropic_answers import Reply, ReplyFrames
from api.anthropic_conversation import conversation
from api.anthropic_form import CountFields, MessagesFields
from api.bodies import described, in_words_of_the_client
from api.continuation import FIELD, Continuation
from api.errors import ANTHROPIC_ERRORS, REQUEST_ID, new_request_id
from api.events import EVENT_STREAM
from api.hearing import Wish, listen
from api.replies import json_reply, warnings_entry
from api.service import Service, open_answers, service_of
from api.streaming import AnswerStream, fold
from api.structured import check_grammar

WORDS = {
    "max_new_tokens": "max_tokens",
    "stop": "stop_sequences",
    "prompt": "messages",
    FIELD: "messages",
}

router = APIRouter(responses=ANTHROPIC_ERRORS)

Fields = TypeVar("Fields", bound=CountFields)


@dataclass(frozen=True, slots=True)
class Asked(Generic[Fields]):
    """A request that has been read."""

    fields: Fields
    warnings: list[str]
    wish: Wish
    prompt: Sequence[int]


async def _accept(request: Request, form: type[Fields]) -> Asked[Fields]:
    """Raises ApiError or RequestRefused, or Unavailable while there is no model."""
    service = service_of(request)
    fields, warnings = await accept(request, form)
    wish = fields.wish()
    await check_grammar(wish.grammar, fields.format_field)
    return Asked(fields, warnings, wish, await _render(service, fields, wish))


async def _render(service: Service, fields: CountFields, wish: Wish) -> list[int]:
    """The prompt of a conversation; where it ends with the assistant, the answer goes on there.

    Raises ApiError or RequestRefused.
    """
    messages = conversation(fields.system, fields.messages)
    continuation = Continuation() if messages[-1]["role"] == "assistant" else None
    with in_words_of_the_client(WORDS):
        return await service.encode_chat(
            messages if continuation is None else continuation.marked(messages),
            tools=wish.shown,
            add_generation_prompt=continuation is None,
            template_kwargs=wish.template_kwargs,
            edit=None if continuation is None else continuation.cut,
        )


@router.post("/v1/messages", openapi_extra=described(MessagesFields, streams=[EVENT_STREAM]))
async def messages(request: Request) -> Response:
    """Answer a conversation: streamed as events, or whole."""
    service = service_of(request)
    asked = await _accept(request, MessagesFields)
    fields = asked.fields
    hearing = await listen(service, asked.prompt, asked.wish)
    with in_words_of_the_client(WORDS):
        ask = fields.ask(asked.prompt, hearing, service.model.defaults, service.model.tokenizer)
        id = f"msg_{secrets.token_hex(12)}"
        answers = open_answers(request, id, [ask], asked.warnings, events=fields.stream)
    reply = Reply(
        answers,
        hearing.open_ear(),
        service.model.names[0],
        fields.shows_thoughts,
        bool(fields.receipt),
    )
    request_id = new_request_id()
    headers = {REQUEST_ID: request_id}
    if fields.stream:
        return AnswerStream(answers, ReplyFrames(reply, request_id), headers)
    [whole] = await fold(request, answers)
    return json_reply(reply.whole(whole), headers=headers)


@router.post("/v1/messages/count_tokens", openapi_extra=described(CountFields))
async def count_tokens(request: Request) -> Response:
    """How many tokens the same request to `/v1/messages` would put in."""
    asked = await _accept(request, CountFields)
    count = {"input_tokens": len(asked.prompt), **warnings_entry(asked.warnings)}
    return json_reply(count, headers={REQUEST_ID: new_request_id()})
