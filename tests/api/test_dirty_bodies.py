"""Whatever stands in a body, of any route: an answer, or an error in its shape that is no 5xx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api import server
from api.bodies import MAX_BODY
from tests.api.in_process import Server, serve
from tests.api.route_bodies import BODIES, MORE

UNPAUSED = [path for path in (*BODIES, *MORE) if "_generation" not in path]
DEEP: Any = "x"
for _ in range(100):
    DEEP = [DEEP]
DIRTY: list[Any] = [
    None,
    True,
    -1,
    1 << 63,
    1 << 300,
    0.5,
    float("nan"),
    float("-inf"),
    "",
    "\0\U0010ffff",
    [],
    [None],
    [{}],
    {},
    {"": {}, "type": None},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}}},
    DEEP,
]


NO_JSON = (b"", b"\xff\xfe", b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}', b"[" * 100_000)


def forms(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The bodies that a route's description allows."""
    found: list[dict[str, Any]] = [schema] if "properties" in schema else schema["anyOf"]
    return found


def places(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of each field that a schema describes, two objects deep."""
    for branch in [schema, *schema.get("anyOf", ()), schema.get("items", {})]:
        for name, inner in branch.get("properties", {}).items():
            yield (*path, name)
            if not path:
                yield from places(inner, (*path, name))


def made_worse(body: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """`body` with `value` at `path`."""
    name, *rest = path
    inner = body.get(name)
    if rest:
        value = made_worse(inner if isinstance(inner, dict) else {}, tuple(rest), value)
    return {**body, name: value}


def check(answer: httpx.Response, sent: object) -> None:
    """Raise AssertionError for what no client may see."""
    assert answer.status_code < 500, f"{answer.status_code} for {sent!r:.300}: {answer.text:.300}"
    if answer.status_code != 200:
        assert answer.status_code != 422, f"{sent!r:.300}"
        error = answer.json()["error"]
        assert error["message"], f"{sent!r:.300}"
        assert error["type"], f"{sent!r:.300}"


async def throw(found: Server, path: str, body: bytes) -> None:
    check(await found.client.post(path, content=body), body)


@pytest.mark.parametrize("path", UNPAUSED)
def test_any_value_in_any_described_field_is_an_answer_or_a_refusal(path: str) -> None:
    async def scenario() -> None:
        async with serve(*server.ROUTERS) as found:
            document = (await found.client.get("/openapi.json")).json()
            described = document["paths"][path]["post"]["requestBody"]["content"]
            good = (BODIES | MORE)[path]
            fields = {
                place
                for form in forms(described["application/json"]["schema"])
                for place in places(form)
            }
            assert {place[0] for place in fields} >= good.keys()
            for place in sorted(fields):
                for value in DIRTY:
                    body = made_worse(good, place, value)
                    await throw(found, path, json.dumps(body).encode())

    asyncio.run(scenario())


def huge(field: str) -> Iterator[bytes]:
    """Bodies of almost the most bytes that are read: a text, and ids."""
    room = MAX_BODY - len(field) - 10
    yield b'{"%b": "%b"}' % (field.encode(), b"x" * room)
    yield b'{"%b": [%b1]}' % (field.encode(), b"11111111111111," * (room // 15))


@pytest.mark.parametrize("path", UNPAUSED)
def test_a_body_of_any_bytes_is_answered(path: str) -> None:
    first = next(iter((BODIES | MORE)[path]))

    async def scenario() -> None:
        async with serve(*server.ROUTERS) as found:
            for body in NO_JSON:
                answer = await found.client.post(path, content=body)
                assert answer.status_code == 400
                check(answer, body)
            for body in huge(first):
                await throw(found, path, body)
            beyond = await found.client.post(path, content=b" " * (MAX_BODY + 1))
            assert beyond.status_code == 413

    asyncio.run(scenario())
