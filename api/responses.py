"""`/v1/responses`: OpenAI's newer form of conversations, and what is kept of them.

State is kept for those who ask (`store: true`), and no longer than its bounds allow.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from api.accepting import accept
from api.answers import Answers
from api.bodies import described, in_words_of_the_client, refuse_unsupported
from api.errors import ApiError, refused
from api.events import EVENT_STREAM
from api.hearing import Hearing, listen
from api.replies import json_reply, warnings_entry
from api.response_store import Item, StoredResponse
from api.responses_form import LOGPROBS, ResponsesFields
from api.responses_input import check_calls, items_of, messages_of, references
from api.responses_telling import ResponseTelling, Told
from api.service import Service, open_answers, owner_of, service_of
from api.streaming import AnswerStream, unless_gone
from api.structured import check_grammar

router = APIRouter()

WORDS = {  # what this form calls our fields
    "max_new_tokens": "max_output_tokens",
    "min_new_tokens": "min_tokens",
    "messages": "input",
    "prompt": "input",
}


@router.post("/v1/responses", openapi_extra=described(ResponsesFields, streams=[EVENT_STREAM]))
async def create(request: Request) -> Response:
    """Answer a conversation: streamed as server-sent events, or whole."""
    service = service_of(request)
    fields, warnings = await accept(request, ResponsesFields)
    owner = owner_of(request)
    before, given = _items(service, owner, fields)
    with in_words_of_the_client(WORDS):
        prompt, hearing = await _prepare(service, fields, [*before, *given])
        ask = fields.ask(prompt, hearing, service.model.defaults)
        name = secrets.token_hex(24)
        answers = open_answers(request, f"resp_{name}", [ask], warnings, events=fields.stream)

    def ended(response: dict[str, Any]) -> None:
        if fields.store:
            service.responses.keep(owner, StoredResponse(response, before, given))

    head = {**_head(service, answers), **fields.echo(ask.sampling)}
    told = Told(name, head, service.model.tokenizer, bool(fields.receipt), ended)
    telling = ResponseTelling(told, hearing.open_ear())
    if fields.stream:
        return AnswerStream(answers, telling)
    try:
        await unless_gone(request.receive, _fold(answers, telling))
    finally:
        answers.close()
    return json_reply(telling.response)


async def _fold(answers: Answers, telling: ResponseTelling) -> None:
    """Tell the whole answer. Raises BackendFailed when its engine failed."""
    while pieces := await answers.pieces():
        for answer, piece in pieces:
            if piece.error is not None:
                raise piece.error
            telling.frame(answer, piece)


def _items(
    service: Service, owner: str, fields: ResponsesFields
) -> tuple[Sequence[Item], Sequence[Item]]:
    """The items of the turns before, and those that are given. Raises ApiError 400."""
    before: Sequence[Item] = ()
    if fields.previous_response_id is not None:
        name = "previous_response_id"
        previous = service.responses.get(owner, fields.previous_response_id)
        if previous is None:
            message = f"{name}: no response {fields.previous_response_id!r:.80} is stored here"
            raise ApiError(400, message, param=name, code="previous_response_not_found")
        before = previous.conversation
    given = items_of(fields.input, service.responses.items(owner, references(fields.input)))
    check_calls(given, before)
    return before, given


async def _prepare(
    service: Service, fields: ResponsesFields, items: Sequence[Item]
) -> tuple[list[int], Hearing]:
    """The prompt, and how its answer is heard. Raises ApiError or RequestRefused."""
    wish = fields.wish()
    await check_grammar(wish.grammar, "text.format.schema")
    prompt = await service.encode_chat(
        messages_of(fields.instructions, items),
        tools=wish.shown,
        template_kwargs=fields.template_kwargs(wish),
    )
    hearing = await listen(service, prompt, wish)
    if fields.scored and not hearing.plain:
        message = f"{LOGPROBS!r} is not supported beside tools and thoughts"
        raise refused(f"include: {message}", "include")
    return prompt, hearing


def _head(service: Service, answers: Answers) -> dict[str, Any]:
    """What a response begins with."""
    return {
        "id": answers.id,
        "object": "response",
        "created_at": answers.created,
        "model": service.model.names[0],
        **warnings_entry(answers.warnings),
    }


def _stored(request: Request, id: str, *known: str) -> StoredResponse:
    """The response that is asked about; `known` are the parameters that the route reads.

    Raises ApiError 404 for one that is not there, or is somebody else's, and 400 for any other
    parameter.
    """
    for name in request.query_params:
        if name not in known:
            raise refused(f"{name} is not supported by this server", name)
    stored = service_of(request).responses.get(owner_of(request), id)
    if stored is None:
        raise _not_found(id)
    return stored


def _not_found(id: str) -> ApiError:
    message = f"response_id: no response {id!r:.80} is stored here"
    return ApiError(404, message, param="response_id", code="response_not_found")


@router.get("/v1/responses/{response_id}")
async def retrieve(request: Request, response_id: str, stream: bool | None = None) -> Response:
    """A stored response."""
    refuse_unsupported({"stream": (stream, False)})
    return json_reply(_stored(request, response_id, "stream").response)


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    """Forget a stored response. Those that continue it keep what they took from it."""
    if not service_of(request).responses.delete(owner_of(request), response_id):
        raise _not_found(response_id)
    return json_reply({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel(request: Request, response_id: str) -> Response:
    """Refused: only what runs in the background can be cancelled, and nothing here does."""
    _stored(request, response_id)
    message = "response_id: only a background response can be cancelled, and this is none"
    raise refused(message, "response_id")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What a stored response answered, page by page, the newest first unless asked otherwise."""
    items = _stored(request, response_id, "after", "limit", "order").input
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise refused(f"after: no item {after!r:.80} is in this list", "after")
        items = items[places[0] + 1 :]
    page = items[:limit]
    content = {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
    return json_reply(content)
