"""`x-strict: 1` is STRICT_FIELDS for one request, on every route that takes a body."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from api import server
from api.auth import Keys
from tests.api.in_process import serve
from tests.api.route_bodies import BODIES, MORE

# A verb of the control plane is strict in itself; the others read no body.
OTHERS = ["/control", "/flush_cache", "/v1/responses/{response_id}/cancel"]


def ask(path: str, more: dict[str, Any], **headers: str) -> httpx.Response:
    async def exchange() -> httpx.Response:
        async with serve(*server.ROUTERS) as found:
            found.app.state.keys = Keys()
            body = {**(BODIES | MORE)[path], **more}
            return await found.client.post(path, json=body, headers=headers)

    return asyncio.run(exchange())


def test_every_route_that_takes_a_body_is_asked_here() -> None:
    paths = [
        route.path
        for router in server.ROUTERS
        for route in router.routes
        if isinstance(route, Route) and "POST" in (route.methods or ())
    ]
    assert sorted(paths) == sorted([*BODIES, *MORE, *OTHERS])


@pytest.mark.parametrize("path", BODIES)
def test_an_unknown_field_is_a_warning_without_the_header(path: str) -> None:
    lenient = ask(path, {"nobody_knows_me": 1})
    assert lenient.status_code == 200, lenient.text
    assert "nobody_knows_me" in lenient.text


@pytest.mark.parametrize("path", [*BODIES, *MORE])
def test_an_unknown_field_is_refused_with_the_header(path: str) -> None:
    strict = ask(path, {"nobody_knows_me": 1}, **{"x-strict": "1"})
    assert strict.status_code == 400, strict.text
    assert "nobody_knows_me" in strict.json()["error"]["message"]


@pytest.mark.parametrize("path", [*BODIES, *MORE])
def test_any_other_value_of_the_header_is_refused(path: str) -> None:
    wrong = ask(path, {}, **{"x-strict": "yes"})
    assert wrong.status_code == 400, wrong.text
    assert "x-strict" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
def test_the_header_changes_nothing_where_every_field_is_known(path: str) -> None:
    assert ask(path, {}, **{"x-strict": "1"}).status_code == 200


@pytest.mark.parametrize("value", ["0", "1"])
def test_our_own_form_is_strict_whatever_the_header_says(value: str) -> None:
    async def exchange() -> httpx.Response:
        async with serve(*server.ROUTERS) as found:
            body = {"prompt": "hi", "max_new_tokens": 1, "nobody_knows_me": 1}
            return await found.client.post("/generate", json=body, headers={"x-strict": value})

    answer = asyncio.run(exchange())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "nobody_knows_me"
