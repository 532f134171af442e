"""A prompt as OpenAI's clients write it: a text, many texts, token ids, or many lists of ids."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Field, Tag

from api.bodies import MAX_PROMPTS, Texts, TokenIds
from api.service import Service

LIST_FORMS = {str: "a list of texts", int: "a list of ids", list: "a list of lists of ids"}


def _form(prompt: object) -> str | None:
    """Which form is meant; the first element of a list says it."""
    if not isinstance(prompt, list):
        return "a text" if isinstance(prompt, str) else None
    return LIST_FORMS.get(type(prompt[0]) if prompt else int)


Prompt: TypeAlias = Annotated[
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


async def encode_prompts(service: Service, prompt: Any, param: str) -> list[list[int]]:
    """The token ids of every one in a `Prompt`. Raises RequestRefused naming `param`."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    first = prompts[0] if prompts else 0
    if isinstance(first, str):
        return await service.encode(prompts, param)
    return prompts if isinstance(first, list) else [prompts]
