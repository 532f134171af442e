"""`POST /cache/explain`: what a prompt would find in each replica's cache, and why not more.

    {"prompt" or "text" or "input_ids" or "messages", "cache_salt"}
    -> {"prompt_tokens", "page_tokens", "replicas": [{"replica", "hit_tokens", "told_tokens",
                                                      "reason", "message", ...}]}

Computes nothing: it is said from what engines have told and what went to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from api.bodies import (
    Form,
    Salt,
    TokenIds,
    described,
    one_of,
    parse,
    read_body,
    unknown_fields,
    unknown_in,
)
from api.conversation import Messages, check_template_kwargs, unknown_in_messages
from api.errors import refused
from api.replies import json_reply, warnings_entry
from api.service import Service, is_strict, owner_of, service_of
from backend.tokenizer import Tokenizer
from engine.cache_history import Explanation, Reason, around
from engine.text import decode

SOURCES = ("prompt", "text", "input_ids", "messages")
OF_MESSAGES = ("add_generation_prompt", "chat_template_kwargs")
MESSAGES: Mapping[Reason, Callable[[Explanation], str]] = {
    "all": lambda found: "all that a cache may answer: the last token is always computed",
    "short": lambda found: "the prompt is shorter than a page and a token",
    "evicted": lambda found: f"the next block left the cache {found.evicted_s:.1f} s ago",
    "other_salt": lambda found: "more of it is cached under another salt",
    "diverged": lambda found: f"the nearest prompt has another token at position {found.at}",
    "ended": lambda found: f"the nearest prompt ends at position {found.at}",
    "cold": lambda found: "no prompt that goes on like this one is remembered",
}

router = APIRouter()


class ExplainBody(Form):
    """The prompt in question: one of the first four fields."""

    model_config = one_of(*SOURCES)

    prompt: str | None = None
    text: str | None = Field(None, description="the same")
    input_ids: TokenIds | None = None
    messages: Messages | None = None
    model: str | None = Field(None, description="one of the names that the model is served under")
    cache_salt: Salt | None = Field(None, description="prefixes are shared within one salt only")
    add_generation_prompt: bool | None = Field(None, description="of messages; default: true")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="of messages")

    def source(self) -> str:
        """The field that is given. Raises ApiError for others, and for fields of no use to it."""
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise refused(f"give one of {', '.join(SOURCES)}", given[-1] if given else SOURCES[0])
        for name in OF_MESSAGES if given[0] != "messages" else ():
            if getattr(self, name) is not None:
                raise refused(f"{name} is for messages, not for {given[0]}", name)
        check_template_kwargs(self.chat_template_kwargs)
        return given[0]


@router.post("/cache/explain", openapi_extra=described(ExplainBody))
async def explain(request: Request) -> Response:
    """How many tokens of a prompt would be cached where, and why not more."""
    service = service_of(request)
    body = parse(await read_body(request), ExplainBody)
    unknown = unknown_in(body, {}) | unknown_in_messages(body.messages or ())
    warnings = unknown_fields(unknown, is_strict(request))
    service.check_model(body.model)
    if not service.settings.backend.cache.prefix:
        raise refused("no prefix is ever cached by this server: it runs with PREFIX_CACHE=0")
    source = body.source()
    ids = await _encode(service, body, source)
    _check(ids, service, source)
    found = await service.pool.explain(owner_of(request), body.cache_salt or "", ids)
    tokenizer = service.model.tokenizer
    content = {
        "prompt_tokens": len(ids),
        "page_tokens": service.model.spec.page_tokens,
        "replicas": [_replica(each, ids, tokenizer) for each in found],
    }
    return json_reply(content | warnings_entry(warnings))


async def _encode(service: Service, body: ExplainBody, source: str) -> list[int]:
    if body.messages is not None:
        return await service.encode_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=body.chat_template_kwargs,
        )
    if body.input_ids is not None:
        return body.input_ids
    (ids,) = await service.encode([getattr(body, source)], source)
    return ids


def _check(ids: list[int], service: Service, source: str) -> None:
    """Raise ApiError or RequestRefused for what no engine would take."""
    spec = service.model.spec
    if not ids:
        raise refused(f"{source} is empty: give at least one token", source)
    if len(ids) > spec.max_model_len:
        raise refused(
            f"{source} of {len(ids):,} tokens exceeds the context of {spec.max_model_len:,}", source
        )
    spec.check_ids(source, ids)


def _replica(found: Explanation, ids: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    more: dict[str, Any] = {"evicted_s_ago": found.evicted_s, "at": found.at}
    if found.at is not None and tokenizer.longest:
        more["yours"] = decode(tokenizer, around(ids, found.at), skip_special_tokens=False)
        more["theirs"] = decode(tokenizer, found.theirs, skip_special_tokens=False)
    return {
        "replica": found.replica,
        "hit_tokens": found.hit,
        "told_tokens": found.certain,
        "reason": found.reason,
        "message": MESSAGES[found.reason](found),
        **{name: value for name, value in more.items() if value is not None},
    }
