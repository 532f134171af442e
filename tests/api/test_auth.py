"""Who is let in, from where, and that no key shows anywhere."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from api.auth import ApiKeyMiddleware, Keys, fingerprint, require_admin
from api.errors import ApiError, api_error
from api.service import owner_of
from backend.interface import StartFailed
from config import ServerSettings

HERE = "127.0.0.1"
ELSEWHERE = "203.0.113.9"


def keys(api: str | None = None, admin: str | None = None) -> Keys:
    return Keys.of(ServerSettings.model_validate({"API_KEY": api, "ADMIN_API_KEY": admin}))


def client(keys: Keys, host: str = ELSEWHERE, root_path: str = "") -> TestClient:
    """A client at `host` of an app with open, ordinary and operators' routes."""
    app = FastAPI()
    app.state.keys = keys
    app.add_middleware(ApiKeyMiddleware, keys=keys)

    async def owner(request: Request) -> dict[str, str]:
        return {"owner": owner_of(request)}

    async def admin(request: Request) -> dict[str, str]:
        require_admin(request)
        return {"admin": "yes"}

    for path in ("/health", "/health/ready", "/health_generate", "/metrics", "/v1/models"):
        app.get(path)(owner)
    app.post("/control")(admin)
    app.add_exception_handler(ApiError, lambda r, error: api_error(error).response(r.scope))
    return TestClient(app, client=(host, 50000), root_path=root_path)


async def nothing() -> Message:
    return {"type": "http.request"}


async def send(message: Message) -> None:
    """Nobody listens."""


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_keys_everybody_is_let_in_and_nobody_has_a_name() -> None:
    answer = client(keys()).get("/v1/models")
    assert (answer.status_code, answer.json()) == (200, {"owner": ""})


@pytest.mark.parametrize(
    "headers",
    [
        bearer("one"),
        bearer("two"),
        {"Authorization": "bearer  one "},
        {"X-API-Key": "one"},
        {"X-API-Key": "wrong", "Authorization": "Bearer two"},
    ],
)
def test_any_of_the_keys_lets_in_by_either_header(headers: dict[str, str]) -> None:
    assert client(keys("one, two")).get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("on"),
        bearer("onee"),
        bearer("ONE"),
        bearer("one,two"),
        bearer("one, two"),
        {"Authorization": "one"},
        {"Authorization": "Basic one"},
        {"Authorization": "Bearerone"},
        {"X-API-Key": ""},
        {"Cookie": "key=one"},
    ],
)
def test_anything_else_is_a_401_that_says_how(headers: dict[str, str]) -> None:
    answer = client(keys("one,two")).get("/v1/models", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_api_key"


def test_a_key_of_any_characters_works() -> None:
    answer = client(keys("schlüssel")).get(
        "/v1/models", headers={b"Authorization": "Bearer schlüssel".encode()}
    )
    assert answer.status_code == 200


def test_a_key_in_the_url_does_not_count() -> None:
    assert client(keys("one")).get("/v1/models?api_key=one").status_code == 401


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/metrics"])
def test_probes_and_scrapers_need_no_key(path: str) -> None:
    assert client(keys("one")).get(path).status_code == 200


@pytest.mark.parametrize("path", ["/", "/static/page.js"])
def test_the_page_is_the_same_for_everybody(path: str) -> None:
    assert client(keys("one")).get(path).status_code == 404  # not there, in this app


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_need_no_key_below_a_prefix_either(path: str) -> None:
    assert client(keys("one"), root_path="/model").get(f"/model{path}").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/messages",
        "/health_generate",
        "/healthy",
        "/metrics/",
        "/nothing",
        "/docs",
        "http://testserver//health",
    ],
)
def test_everything_else_needs_one_also_what_does_not_exist(path: str) -> None:
    assert client(keys("one")).get(path).status_code == 401


def test_no_spelling_of_a_path_passes_as_an_open_one() -> None:
    """Raw scopes: a client would tidy the path up."""
    reached: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])

    guarded = ApiKeyMiddleware(app, keys("one"))
    for path in ("/v1/health", "/health../v1", "/HEALTH", "health", "/metrics/../v1/models", ""):
        asyncio.run(guarded({"type": "http", "path": path, "headers": []}, nothing, send))
    assert reached == []


def test_the_owner_is_the_fingerprint_of_the_key_that_was_used() -> None:
    asked = client(keys("one,two"))
    owners = {
        key: asked.get("/v1/models", headers=bearer(key)).json()["owner"] for key in ("one", "two")
    }
    assert owners == {"one": fingerprint("one"), "two": fingerprint("two")}
    assert fingerprint("one") != fingerprint("two")
    assert len(fingerprint("one")) == 16
    assert asked.get("/health", headers=bearer("one")).json()["owner"] == fingerprint("one")
    assert asked.get("/health").json()["owner"] == ""


def test_what_is_no_request_passes() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError("reached")

    with pytest.raises(LookupError):
        asyncio.run(ApiKeyMiddleware(app, keys("one"))({"type": "lifespan"}, nothing, send))


@pytest.mark.parametrize(("api", "admin", "flag"), [(" , ", None, "API_KEY"), (None, " ", "ADMIN")])
def test_a_flag_without_a_key_stops_the_start(
    api: str | None, admin: str | None, flag: str
) -> None:
    with pytest.raises(StartFailed, match=flag):
        keys(api, admin)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1", "0:0:0:0:0:0:0:1"]
)
def test_without_an_admin_key_programs_on_this_machine_are_the_operator(host: str) -> None:
    assert client(keys(), host).post("/control").status_code == 200


@pytest.mark.parametrize(
    "host", [ELSEWHERE, "::ffff:203.0.113.9", "2001:db8::1", "localhost", "", "127.0.0.1.evil.org"]
)
def test_without_an_admin_key_nobody_else_is(host: str) -> None:
    answer = client(keys(), host).post("/control")
    assert answer.status_code == 403
    assert "ADMIN_API_KEY" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-For": ""},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Origin": "http://localhost:8000"},
    ],
)
def test_a_proxy_or_a_web_page_on_this_machine_is_not_the_operator(headers: dict[str, str]) -> None:
    assert client(keys(), HERE).post("/control", headers=headers).status_code == 403


def test_a_client_without_an_address_is_not_the_operator() -> None:
    """So are those of a Unix socket, which a proxy may stand behind."""
    app = FastAPI()
    app.state.keys = keys()
    request = Request({"type": "http", "headers": [], "client": None, "app": app})
    with pytest.raises(ApiError) as refusal:
        require_admin(request)
    assert refusal.value.status == 403


def test_an_api_key_alone_leaves_the_operator_to_this_machine() -> None:
    assert client(keys("one"), HERE).post("/control").status_code == 401
    assert client(keys("one"), HERE).post("/control", headers=bearer("one")).status_code == 200
    assert client(keys("one")).post("/control", headers=bearer("one")).status_code == 403


@pytest.mark.parametrize("host", [HERE, ELSEWHERE])
@pytest.mark.parametrize("api", [None, "one"])
def test_an_admin_key_is_the_only_way_where_there_is_one(host: str, api: str | None) -> None:
    asked = client(keys(api, "root"), host)
    assert asked.post("/control", headers=bearer("root")).status_code == 200
    assert asked.post("/control", headers={"X-API-Key": "root", "X-Forwarded-For": "1.2.3.4"})
    for headers in ({}, bearer("one"), bearer("roo")):
        answer = asked.post("/control", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


def test_the_admin_key_opens_ordinary_routes_too() -> None:
    asked = client(keys("one", "root"))
    answer = asked.get("/v1/models", headers=bearer("root"))
    assert answer.json() == {"owner": fingerprint("root")}
    assert asked.get("/v1/models", headers=bearer("one")).status_code == 200


def test_an_admin_key_alone_closes_no_ordinary_route() -> None:
    assert client(keys(None, "root")).get("/v1/models").json() == {"owner": ""}


def test_keys_show_in_no_log_and_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = ("s3cret-one", "s3cret-root", "s3cret-wrong")
    known = keys("s3cret-one", "s3cret-root")
    asked = client(known)
    said = [
        asked.request(method, path, headers=bearer(key)).text
        for method, path in (("GET", "/v1/models"), ("POST", "/control"))
        for key in secrets
    ]
    assert len(said) == 6
    for secret in secrets:
        assert secret not in f"{said} {caplog.text} {known!r}"
