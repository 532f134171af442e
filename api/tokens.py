"""`POST /tokenize` and `POST /detokenize`: text to ids and back, in vLLM's and SGLang's words.

    {"prompt" or "text": str | [str]} or {"messages"}  ->  {"tokens", "count", "max_model_len"}
    {"tokens": [int] | [[int]]}                        ->  {"prompt", "text"}: the same twice

Lists of texts, or of lists of ids, are answered by lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from api.bodies import (
    MAX_PROMPTS,
    Form,
    Texts,
    TokenIds,
    described,
    in_words_of_the_client,
    one_of,
    parse,
    read_body,
    unknown_fields,
    unknown_in,
)
from api.conversation import Messages, check_template_kwargs, unknown_in_messages
from api.errors import refused
from api.replies import json_reply, warnings_entry
from api.service import Service, is_strict, service_of
from backend.tokenizer import Tokenizer
from engine.text import decode

MAX_TEXT = 4 << 20  # characters of one request: tokenizing takes a hundred bytes for each of them

# Known to clients and not served: the value that asks for nothing, besides null.
UNSERVED: Mapping[str, Any] = {
    "tools": [],
    "return_token_strs": False,
    "continue_final_message": False,
    "chat_template": None,
    "mm_processor_kwargs": None,
}
SOURCES = ("prompt", "text", "messages")
OF_MESSAGES = ("add_generation_prompt", "chat_template_kwargs")

router = APIRouter()


class TokenizeBody(Form):
    """What is to be tokenized: one of the first three fields."""

    model_config = one_of(*SOURCES)

    prompt: str | Texts | None = None
    text: str | Texts | None = None
    messages: Messages | None = None
    model: str | None = Field(None, description="one of the names that the model is served under")
    add_special_tokens: bool | None = Field(None, description="default: true, but for messages")
    add_generation_prompt: bool | None = Field(None, description="of messages; default: true")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="of messages")

    @property
    def source(self) -> str:
        """The field that is given. Raises ApiError unless it is exactly one."""
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise refused(f"give one of {', '.join(SOURCES)}", given[-1] if given else SOURCES[0])
        return given[0]

    def check(self) -> None:
        """Raise ApiError for fields that do not go together."""
        if self.source != "messages":
            for name in OF_MESSAGES:
                if getattr(self, name) is not None:
                    raise refused(f"{name} is for messages, not for {self.source}", name)
        elif self.add_special_tokens:
            name = "add_special_tokens"
            raise refused(f"{name} is not for messages: their template spells them out", name)
        check_template_kwargs(self.chat_template_kwargs)

    def unknown(self) -> dict[str, Any]:
        """Fields that nothing here knows, by path. Raises ApiError for one that is not served."""
        return unknown_in(self, UNSERVED) | unknown_in_messages(self.messages or ())


class DetokenizeBody(Form):
    """The ids of a text, or of each of many."""

    tokens: TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)]
    model: str | None = Field(None, description="one of the names that the model is served under")
    skip_special_tokens: bool | None = Field(None, description="default: true")


@router.post("/tokenize", openapi_extra=described(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """The token ids of a text, of each of many, or of a conversation."""
    service = service_of(request)
    body = parse(await read_body(request), TokenizeBody)
    body.check()
    warnings = unknown_fields(body.unknown(), is_strict(request))
    service.check_model(body.model)
    tokens, many = await _encode(service, body)
    counts = [len(each) for each in tokens]
    content = {
        "tokens": tokens if many else tokens[0],
        "count": counts if many else counts[0],
        "max_model_len": service.model.spec.max_model_len,
    }
    return json_reply(content | warnings_entry(warnings))


@router.post("/detokenize", openapi_extra=described(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """The text of token ids, or of each list of many."""
    service = service_of(request)
    body = parse(await read_body(request), DetokenizeBody)
    warnings = unknown_fields(unknown_in(body, {}), is_strict(request))
    service.check_model(body.model)
    tokenizer = service.model.tokenizer
    if not tokenizer.longest:
        raise refused("this model has no tokenizer.json: its ids have no text", "tokens")
    given: Any = body.tokens
    many = bool(given) and isinstance(given[0], list)
    skip = body.skip_special_tokens is not False
    texts = await asyncio.to_thread(_decode, tokenizer, given if many else [given], skip)
    text = texts if many else texts[0]
    return json_reply({"prompt": text, "text": text, **warnings_entry(warnings)})


async def _encode(service: Service, body: TokenizeBody) -> tuple[list[list[int]], bool]:
    """The ids of each text, and whether a list was given. Texts may be too long for the context:
    whoever asks may want to know that. Raises RequestRefused.
    """
    if body.messages is not None:
        conversation = await service.encode_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=body.chat_template_kwargs,
        )
        return [conversation], False
    given = getattr(body, body.source)
    texts = [given] if isinstance(given, str) else given
    size = sum(map(len, texts))
    if size > MAX_TEXT:
        message = f"{body.source} has {size:,} characters, {MAX_TEXT:,} are allowed"
        raise refused(message, body.source)
    special = body.add_special_tokens is not False
    with in_words_of_the_client({"prompt": body.source}):
        ids = await asyncio.to_thread(service.model.tokenizer.encode_batch, texts, special)
    return ids, isinstance(given, list)


def _decode(
    tokenizer: Tokenizer, lists: Sequence[Sequence[int]], skip_special_tokens: bool
) -> list[str]:
    """Raises ApiError for an id that is not in the vocabulary."""
    for ids in lists:
        if ids and not (min(ids) >= 0 and max(ids) < tokenizer.vocabulary):
            wrong = next(id for id in ids if not 0 <= id < tokenizer.vocabulary)
            message = f"token id {wrong} is outside the vocabulary of {tokenizer.vocabulary}"
            raise refused(f"tokens holds {message}", "tokens")
    return [decode(tokenizer, ids, skip_special_tokens=skip_special_tokens) for ids in lists]
