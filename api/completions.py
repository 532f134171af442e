"""`POST /v1/completions`: OpenAI's text completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from api.bodies import MAX_PROMPTS, Texts, TokenIds, described
from api.openai_answers import Wording, respond
from api.openai_fields import UNSERVED, OpenAIFields, accept
from api.service import Service, service_of

WORDING = Wording(
    id_prefix="cmpl",
    whole="text_completion",
    chunk="text_completion",
    all=lambda text: {"text": text},
    more=lambda text: {"text": text},
    opening=None,
    closing={"text": ""},
)

router = APIRouter()


def _form(prompt: object) -> str | None:
    """Which form of `Prompt` is meant; the first element of a list says it."""
    if not isinstance(prompt, list):
        return "a text" if isinstance(prompt, str) else None
    return LIST_FORMS.get(type(prompt[0]) if prompt else int)


LIST_FORMS = {str: "a list of texts", int: "a list of ids", list: "a list of lists of ids"}

Prompt = Annotated[
    Annotated[str, Tag("a text")]
    | Annotated[Texts, Tag("a list of texts")]
    | Annotated[TokenIds, Tag("a list of ids")]
    | Annotated[
        list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("a list of lists of ids")
    ],
    Discriminator(
        _form,
        custom_error_type="prompt_form",
        custom_error_message="must be a text, a list of texts, token ids, or lists of token ids",
    ),
]


class CompletionFields(OpenAIFields):
    """The body of a request."""

    prompt_field = "prompt"
    unserved: ClassVar[Mapping[str, Any]] = {
        **UNSERVED,
        "echo": False,
        "best_of": 1,
        "suffix": "",
        "logprobs": None,  # 0 asks for the log-probability of the token itself
        "add_special_tokens": True,
    }

    prompt: Prompt


async def _encode(service: Service, prompt: Any) -> list[list[int]]:
    """The token ids of every prompt, whichever form they have."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    first = prompts[0] if prompts else 0
    if isinstance(first, str):
        return await service.encode(prompts, CompletionFields.prompt_field)
    return prompts if isinstance(first, list) else [prompts]


@router.post("/v1/completions", openapi_extra=described(CompletionFields))
async def completions(request: Request) -> Response:
    """Continue each prompt: streamed as server-sent events, or whole."""
    fields, warnings = await accept(request, CompletionFields)
    prompts = await _encode(service_of(request), fields.prompt)
    return await respond(request, fields, prompts, warnings, WORDING)
