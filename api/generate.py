"""`POST /generate`: one route, two request forms, told apart by their fields."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from api import native_form, sglang_form
from api.bodies import decode, described, read_body
from api.errors import refused
from api.events import EVENT_STREAM, JSON_LINES

router = APIRouter()

FORMS = (native_form.NativeBody, sglang_form.SglangBody)
OURS = frozenset(native_form.NativeBody.model_fields)
SGLANGS = frozenset(sglang_form.SglangBody.model_fields) | sglang_form.UNSERVED.keys()


@router.post("/generate", openapi_extra=described(*FORMS, streams=[JSON_LINES, EVENT_STREAM]))
async def generate(request: Request) -> Response:
    """Answer a prompt.

    Ours: `prompt` with everything beside it; a stream of JSON lines unless `stream` is false.
    SGLang's: `text` or `input_ids` with `sampling_params`; one object unless `stream` is true.
    """
    value = decode(await read_body(request))
    respond = sglang_form.respond if _is_sglangs(value) else native_form.respond
    return await respond(request, value)


def _is_sglangs(value: dict[str, Any]) -> bool:
    """Raises ApiError for a body that is of both forms, or of neither."""
    given = {name for name, content in value.items() if content is not None}
    ours, theirs = given & OURS - SGLANGS, given & SGLANGS - OURS
    if ours and theirs:
        raise refused(
            f"the body mixes two forms: {_listed(ours)} of ours (with prompt) and "
            f"{_listed(theirs)} of SGLang's (with text or input_ids, and sampling_params)",
            min(theirs),
        )
    if given.isdisjoint(("prompt", "text", "input_ids")):
        raise refused("give a prompt (our form), or text or input_ids (SGLang's)", "prompt")
    return bool(theirs)


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
