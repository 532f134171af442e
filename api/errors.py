"""What a client is told when something is wrong: one JSON shape, the right status, no trace.

{"error": {"message", "type", "param", "code"}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api.replies import json_reply
from backend.interface import EngineError, Overloaded, RequestRefused, Unavailable

BAD_REQUEST = "invalid_request_error"
RETRY_UNAVAILABLE_S = 1  # engines start, drain and return within seconds


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

    def response(self) -> Response:
        """The whole answer."""
        return json_reply(self.body(), self.status, self.headers)


def refused(message: str, param: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param)


def model_not_found(name: str) -> ApiError:
    """A 404 for a `model` that is not served here."""
    message = f"model {name!r} is not served here"
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


class ClientGone(Exception):
    """Nobody is there to be answered."""


def answer_errors(app: FastAPI, rejected: Callable[[str], object] = lambda reason: None) -> None:
    """Give every error of `app` the one shape, whoever raises it. `rejected` hears why a request
    was not taken.
    """

    async def answer(_: Request, error: Exception) -> Response:
        found = api_error(error)
        if found.status < 500 or isinstance(error, Unavailable):
            rejected(found.code or "invalid")
        return found.response()

    for kind in (ApiError, EngineError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(ClientGone, _answer_nobody)


async def _answer_http(_: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers or {}).response()


async def _answer_validation(_: Request, error: Exception) -> Response:
    """A parameter of the query or the path."""
    assert isinstance(error, RequestValidationError)
    detail = error.errors()[0]
    name = str(detail["loc"][-1])
    return refused(f"{name}: {detail['msg']}", name).response()


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for a client that left
