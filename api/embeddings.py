"""`POST /v1/embeddings`: prompts as vectors of length 1, in OpenAI's words.

    {"input": ..., "encoding_format", "dimensions", "pooling"}
    -> {"object": "list", "data": [{"object": "embedding", "index", "embedding"}], "model", "usage"}

The engine brings the mean or the last of a prompt's final hidden states; here it is cut and scaled.
"""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from api.answers import Ask, Whole
from api.bodies import (
    Form,
    Salt,
    described,
    in_words_of_the_client,
    parse,
    read_body,
    unknown_fields,
    unknown_in,
)
from api.embedding_model import EmbeddingModel, embedding_model
from api.prompts import Prompt, encode_prompts
from api.replies import json_reply, warnings_entry
from api.sampling_fields import NO_TOKENS, check_answers
from api.service import Service, is_strict, new_id, open_answers, service_of
from api.streaming import fold
from backend.interface import Pooling, Wants

# Known to clients and not served: the value that asks for nothing, besides null.
UNSERVED: Mapping[str, Any] = {
    "add_special_tokens": True,
    "truncate_prompt_tokens": None,
    "normalize": True,
    "priority": 0,
    "instruction": None,
}

router = APIRouter()


class EmbeddingsBody(Form):
    """The body of a request."""

    input: Prompt
    model: str | None = Field(None, description="one of the names that the model is served under")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="default: float; base64: of little-endian float32"
    )
    dimensions: int | None = Field(None, ge=1, description="for models that allow it")
    pooling: Literal["mean", "last"] | None = Field(
        None, description="default: what the model's folder says; not OpenAI's"
    )
    cache_salt: Salt | None = Field(None, description="prefixes are shared within one salt only")
    user: str | None = Field(None, description="changes nothing")


@router.post("/v1/embeddings", openapi_extra=described(EmbeddingsBody))
async def embeddings(request: Request) -> Response:
    """The vector of each input."""
    service = service_of(request)
    body = parse(await read_body(request), EmbeddingsBody)
    warnings = unknown_fields(unknown_in(body, UNSERVED), is_strict(request))
    service.check_model(body.model)
    model = await asyncio.to_thread(embedding_model, service.model.spec.folder)
    pooling = model.choose(body.pooling)
    with in_words_of_the_client({"prompt": "input"}):
        asks = await _asks(service, body, pooling)
        answers = open_answers(request, new_id("embd"), asks, warnings)
    wholes = await fold(request, answers)
    reply = await asyncio.to_thread(_reply, body, model, wholes)
    name = service.model.names[0]
    return json_reply({**reply, "model": name, **warnings_entry(answers.warnings)})


async def _asks(service: Service, body: EmbeddingsBody, pooling: Pooling) -> list[Ask]:
    prompts = await encode_prompts(service, body.input, "input")
    check_answers(len(prompts), "input")
    wants = Wants(pooling=pooling)
    namespace = body.cache_salt or ""
    return [Ask(prompt, NO_TOKENS, wants=wants, namespace=namespace) for prompt in prompts]


def _reply(body: EmbeddingsBody, model: EmbeddingModel, wholes: Sequence[Whole]) -> dict[str, Any]:
    """Heavy with many inputs: for a thread. Raises ApiError."""
    spell = SPELLINGS[body.encoding_format or "float"]
    data = []
    for index, whole in enumerate(wholes):
        vector = whole.answer.live.pooled
        model.check_dimensions(body.dimensions, len(vector))
        embedding = spell(unit(vector[: body.dimensions]))
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    tokens = sum(whole.answer.prompt_tokens for whole in wholes)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "usage": usage}


def unit(vector: Sequence[float]) -> list[float]:
    """`vector` at length 1; one of zeros stays as it is."""
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


SPELLINGS: Mapping[str, Callable[[list[float]], Any]] = {"float": list, "base64": _base64}
