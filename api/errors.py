"""What a client is told when something is wrong: one JSON shape, the right status, no trace.

{"error": {"message", "type", "param", "code"}}
{"type": "error", "error": {"type", "message"}, "request_id"}    on Anthropic's routes
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from api.replies import json_reply
from backend.interface import EngineError, Overloaded, RequestRefused, Unavailable

BAD_REQUEST = "invalid_request_error"
RETRY_UNAVAILABLE_S = 1  # engines start, drain and return within seconds

ANTHROPICS = "/v1/messages"  # the route, and all below it
REQUEST_ID = "request-id"  # the header that says what `request_id` says in an error
# What Anthropic calls an error of this status or, else, of this type; others have the same name.
ANTHROPIC_TYPES: Mapping[int | str, str] = {
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    "unavailable_error": "overloaded_error",
    "engine_error": "api_error",
    "server_error": "api_error",
}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is not the one asked for."""

    status: int
    message: str
    type: str = BAD_REQUEST
    param: str | None = None  # the field at fault
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)  # beside the four usual keys

    def body(self) -> dict[str, Any]:
        """The object that goes over the wire."""
        usual = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": {**usual, **self.more}}

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        """The same in Anthropic's words."""
        kind = ANTHROPIC_TYPES.get(self.status) or ANTHROPIC_TYPES.get(self.type, self.type)
        error = {"type": kind, "message": self.message}
        if "details" in self.more:
            error["details"] = self.more["details"]
        return {"type": "error", "error": error, "request_id": request_id}

    def response(self, scope: Scope) -> Response:
        """The whole answer to the request of `scope`, in the shape of its route."""
        if not is_anthropics(scope):
            return json_reply(self.body(), self.status, self.headers)
        request_id = new_request_id()
        headers = {REQUEST_ID: request_id, **self.headers}
        return json_reply(self.anthropic_body(request_id), self.status, headers)


def route_of(scope: Scope) -> str:
    """The path of a request, below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_anthropics(scope: Scope) -> bool:
    """Whether a request asks for one of Anthropic's routes, or for one that might have been."""
    return f"{route_of(scope)}/".startswith(f"{ANTHROPICS}/")


def new_request_id() -> str:
    """What Anthropic's clients quote when they ask about a request."""
    return f"req_{secrets.token_hex(12)}"


def refused(message: str, param: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param)


def model_not_found(name: str) -> ApiError:
    """A 404 for a `model` that is not served here."""
    message = f"model {name!r:.80} is not served here"
    return ApiError(404, message, param="model", code="model_not_found")


def api_error(error: Exception) -> ApiError:
    """The answer for whatever was raised while a request was served."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestRefused):
        return refused(str(error), error.param)
    if isinstance(error, Overloaded):
        return ApiError(
            429,
            str(error),
            "overloaded_error",
            code="queue_full",
            headers={"Retry-After": str(max(1, math.ceil(error.retry_after_s)))},
            more={"queue_depth": error.queue_depth, "est_wait_s": round(error.est_wait_s, 3)},
        )
    if isinstance(error, Unavailable):
        headers = {"Retry-After": str(RETRY_UNAVAILABLE_S)}
        return ApiError(503, str(error), "unavailable_error", code="unavailable", headers=headers)
    if isinstance(error, EngineError):
        return ApiError(503, str(error), "engine_error", code="engine_failed")
    return ApiError(500, "internal error: see the server's log", "server_error")


def _shown(**properties: Any) -> dict[int | str, dict[str, Any]]:
    """What /openapi.json says of answers of every other status than those it names."""
    content = {"application/json": {"schema": _object(**properties)}}
    return {"default": {"description": "An error", "content": content}}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT, _TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
ERRORS = _shown(error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL))
ANTHROPIC_ERRORS = _shown(
    type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT), request_id=_TEXT
)


class ClientGone(Exception):
    """Nobody is there to be answered."""


def answer_errors(app: FastAPI, rejected: Callable[[str], object] = lambda reason: None) -> None:
    """Give every error of `app` the one shape, whoever raises it. `rejected` hears why a request
    was not taken.
    """

    async def answer(request: Request, error: Exception) -> Response:
        found = api_error(error)
        if found.status < 500 or isinstance(error, Unavailable):
            rejected(found.code or "invalid")
        return found.response(request.scope)

    for kind in (ApiError, EngineError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(ClientGone, _answer_nobody)


async def _answer_http(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, str(error.detail), headers=error.headers or {})
    return found.response(request.scope)


async def _answer_validation(request: Request, error: Exception) -> Response:
    """A parameter of the query or the path."""
    assert isinstance(error, RequestValidationError)
    detail = error.errors()[0]
    name = str(detail["loc"][-1])
    return refused(f"{name}: {detail['msg']}", name).response(request.scope)


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for a client that left
