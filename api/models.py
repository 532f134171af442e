"""`GET /v1/models`: the one model that is served here, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.replies import json_reply
from api.service import Model, service_of

router = APIRouter()


def _entry(model: Model) -> dict[str, Any]:
    return {
        "id": model.names[0],
        "object": "model",
        "created": model.created,
        "owned_by": "mini-sglang",
        "root": model.spec.model,
        "max_model_len": model.spec.max_model_len,
    }


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """Every model: the one, under the first of its names."""
    return json_reply({"object": "list", "data": [_entry(service_of(request).model)]})


@router.get("/v1/models/{id:path}")
async def model(request: Request, id: str) -> Response:
    """The model, under any of its names. Raises ApiError 404 for another."""
    service = service_of(request)
    service.check_model(id)
    return json_reply(_entry(service.model))
