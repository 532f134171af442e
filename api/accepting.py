"""How a request that is answered with text is taken in: read, checked, its model and fields known.

Called by OpenAI's, Anthropic's and the responses' routes. Our own form of `/generate` and SGLang's
serve models without text too, and are told apart by their fields before they are read.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from fastapi import Request

from api.bodies import Form, parse, read_body
from api.errors import refused
from api.service import is_strict, service_of


class AnsweredForm(Form):
    """The body of such a request."""

    prompt_field: ClassVar[str]  # that holds what is to be answered

    model: str | None

    def warnings(self, strict: bool) -> list[str]:
        """What the client is told of fields that nothing here knows.

        Raises ApiError 400 naming a field that is not served; when `strict`, one that is unknown.
        """
        raise NotImplementedError


Fields = TypeVar("Fields", bound=AnsweredForm)


async def accept(request: Request, form: type[Fields]) -> tuple[Fields, list[str]]:
    """The body of a request, and what the client is to be told of it.

    Raises ApiError, or Unavailable while there is no model.
    """
    service = service_of(request)
    fields = parse(await read_body(request), form)
    service.check_model(fields.model)
    if not service.model.tokenizer.longest:
        raise refused(
            "this model has no tokenizer.json and answers in token ids: use /generate",
            form.prompt_field,
        )
    return fields, fields.warnings(is_strict(request))
