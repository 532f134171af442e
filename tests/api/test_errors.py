"""The shape of an error is its route's, whoever raises it: middleware, router or handler."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Scope

from api.auth import ApiKeyMiddleware, Keys
from api.errors import ApiError, answer_errors, api_error, is_anthropics, route_of
from backend.interface import BackendFailed, Overloaded, RequestRefused, Unavailable
from config import ServerSettings

OURS = ["/generate", "/v1/chat/completions", "/v1/models", "/v1/messagesandmore", "/"]
ANTHROPICS = ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches"]

ERRORS: list[tuple[Exception, int, str, str]] = [
    (RequestRefused("no", "x"), 400, "invalid_request_error", "invalid_request_error"),
    (ApiError(403, "no", "permission_error"), 403, "permission_error", "permission_error"),
    (ApiError(404, "no"), 404, "invalid_request_error", "not_found_error"),
    (ApiError(413, "no"), 413, "invalid_request_error", "request_too_large"),
    (Overloaded("no", 1, 2.0, 3.0), 429, "overloaded_error", "rate_limit_error"),
    (Unavailable("no"), 503, "unavailable_error", "overloaded_error"),
    (BackendFailed("no"), 503, "engine_error", "api_error"),
    (ApiError(504, "no", "timeout_error"), 504, "timeout_error", "timeout_error"),
    (KeyError("no"), 500, "server_error", "api_error"),
]


def scope(path: str, root_path: str = "") -> Scope:
    return {"type": "http", "path": path, "root_path": root_path, "headers": []}


def client(error: Exception | None = None, root_path: str = "") -> TestClient:
    """A client with a wrong key, or where every route raises `error`."""
    app = FastAPI()

    async def raising(_: Request) -> None:
        assert error is not None
        raise error

    for path in (*OURS, *ANTHROPICS):
        app.post(path)(raising)
    answer_errors(app)
    if error is None:
        keys = Keys.of(ServerSettings.model_validate({"API_KEY": "secret"}))
        app.add_middleware(ApiKeyMiddleware, keys=keys)
    return TestClient(app, raise_server_exceptions=False, root_path=root_path)


@pytest.mark.parametrize(("error", "status", "ours", "anthropics"), ERRORS)
def test_each_error_has_a_name_in_both_shapes(
    error: Exception, status: int, ours: str, anthropics: str
) -> None:
    asked = client(error)
    plain = asked.post(OURS[0])
    assert (plain.status_code, plain.json()["error"]["type"]) == (status, ours)
    assert plain.json().keys() == {"error"}
    theirs = asked.post(ANTHROPICS[0])
    message = plain.json()["error"]["message"]
    assert theirs.status_code == status
    assert theirs.json() == {
        "type": "error",
        "error": {"type": anthropics, "message": message},
        "request_id": theirs.headers["request-id"],
    }
    assert theirs.headers.get("retry-after") == plain.headers.get("retry-after")


@pytest.mark.parametrize(
    ("path", "expected"),
    [*((path, False) for path in OURS), *((path, True) for path in ANTHROPICS)],
)
def test_a_missing_key_is_told_in_the_shape_of_the_route(path: str, expected: bool) -> None:
    answer = client().post(path, headers={"x-api-key": "wrong"})
    if answer.status_code != 401:
        assert path == "/"  # the page is for everybody
        return
    assert answer.json()["error"]["type"] == "authentication_error"
    assert ("request_id" in answer.json()) == expected
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", [{"x-api-key": "secret"}, {"authorization": "Bearer secret"}])
def test_either_header_lets_in(key: dict[str, str]) -> None:
    answer = client().post(ANTHROPICS[0], headers=key)
    assert answer.status_code != 401


def test_other_methods_and_unknown_routes_have_the_shape_too() -> None:
    asked = client(KeyError())
    assert asked.get(ANTHROPICS[0]).json()["error"]["type"] == "invalid_request_error"
    assert asked.get("/v1/messages/none").json()["error"]["type"] == "not_found_error"
    assert asked.get(OURS[0]).json().keys() == {"error"}
    assert asked.get("/none").json().keys() == {"error"}


def test_a_route_is_known_below_where_the_app_is_mounted() -> None:
    assert route_of(scope("/api/v1/messages", "/api")) == "/v1/messages"
    assert is_anthropics(scope("/api/v1/messages", "/api"))
    assert not is_anthropics(scope("/api/v1/messages"))


def test_details_are_for_the_client_alone_that_reads_them() -> None:
    error = ApiError(400, "no", more={"details": {"error_code": "a"}})
    assert error.anthropic_body("req_1")["error"]["details"] == {"error_code": "a"}
    assert "details" not in api_error(KeyError()).anthropic_body("req_1")["error"]
