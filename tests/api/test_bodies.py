"""From bytes to a checked value: a fault is a 400 that names the field as the client wrote it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from fastapi import Request
from hypothesis import given, settings, strategies as st
from pydantic import BaseModel, ConfigDict, Field

from api import bodies
from api.bodies import (
    MAX_BODY,
    Texts,
    TokenIds,
    decode,
    described,
    in_words_of_the_client,
    one_of,
    parse,
    parse_value,
    read_body,
    refuse_unsupported,
    unknown_fields,
    unknown_in,
)
from api.errors import ApiError
from backend.interface import RequestRefused, TooLong


class Part(BaseModel):
    """Inside others."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["text"]
    text: str = ""


class Form(BaseModel):
    """Every shape that the request forms have."""

    model_config = ConfigDict(extra="forbid")

    count: int | None = None
    share: float | None = None
    yes: bool | None = None
    stop: str | list[str] | None = None
    ids: TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] | None = None
    texts: str | Texts | None = None
    part: Part | list[Part] | None = None
    parts: list[str | list[Part]] | None = None
    bias: dict[str, float] | None = None


def fault_of(action: Callable[[], object]) -> ApiError | None:
    try:
        action()
    except ApiError as error:
        return error
    return None


def fault(action: Callable[[], object]) -> ApiError:
    error = fault_of(action)
    assert error is not None
    assert error.status == 400
    assert error.param is None or error.param in error.message
    return error


@pytest.mark.parametrize(
    ("value", "param", "said"),
    [
        ({"count": "1"}, "count", "valid integer"),
        ({"count": 1.0}, "count", "valid integer"),
        ({"count": True}, "count", "valid integer"),
        ({"share": "1"}, "share", "valid number"),
        ({"share": True}, "share", "valid number"),
        ({"share": 10**400}, "share", "valid number"),
        ({"yes": 1}, "yes", "valid boolean"),
        ({"yes": "true"}, "yes", "valid boolean"),
        ({"stop": 5}, "stop", "a valid string or a valid list"),
        ({"stop": {"a": 1}}, "stop", "a valid string or a valid list"),
        ({"stop": ["a", 5]}, "stop.1", "valid string"),
        ({"stop": [None]}, "stop.0", "valid string"),
        ({"ids": 5}, "ids", "valid list"),
        ({"ids": ["a"]}, "ids.0", "a valid integer or a valid list"),
        ({"ids": [1, 2, "a"]}, "ids.2", "valid integer"),
        ({"ids": [1, [2]]}, "ids.1", "valid integer"),
        ({"ids": [[1], [2, "a"]]}, "ids.1.1", "valid integer"),
        ({"texts": []}, "texts", "at least 1"),
        ({"texts": ["a"] * 3000}, "texts", "at most 2048"),
        ({"part": 5}, "part", "valid"),
        ({"part": {"text": "a"}}, "part.kind", "required"),
        ({"part": {"kind": "image"}}, "part.kind", "'text'"),
        ({"part": {"kind": "text", "text": 1}}, "part.text", "valid string"),
        ({"part": [{"kind": "text"}, {"kind": "text", "size": 1}]}, "part.1.size", "not a field"),
        ({"parts": ["a", [{"kind": "text"}, {"kind": "text", "text": 1}]]}, "parts.1.1.text", ""),
        ({"bias": {"5": "x"}}, "bias.5", "valid number"),
        ({"bias": [1]}, "bias", "valid dictionary"),
        ({"colour": 1}, "colour", "is not a field of this request"),
    ],
)
def test_a_wrong_value_is_told_by_the_place_the_client_wrote_it_in(
    value: dict[str, Any], param: str, said: str
) -> None:
    error = fault(lambda: parse_value(value, Form))
    assert error.param == param
    assert said in error.message


@pytest.mark.parametrize("value", [[], "a", 5, 1.5, True, None])
def test_a_body_is_an_object(value: object) -> None:
    error = fault(lambda: decode(json.dumps(value).encode()))
    assert error.message.startswith("the body must be a JSON object, not ")
    assert fault(lambda: parse_value(value, Form)).message.startswith("the body: ")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"count": 1',
        b'{"count": 1}}',
        b'{"stop": "\xff"}',
        b'{"stop": "\xed\xa0\x80"}',
        b'{"stop": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"stop": "\x00"}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"count": ' + b"9" * 5000 + b"}",
        b"{'count': 1}",
        b"count=1",
    ],
)
def test_what_is_no_json_is_refused_as_such(body: bytes) -> None:
    error = fault(lambda: parse(body, Form))
    assert error.message.startswith("the body is not valid JSON: ")
    assert error.param is None


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_value_or_a_400(body: bytes) -> None:
    error = fault_of(lambda: parse(body, Form))
    assert error is None or error.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Form.model_fields, "other"]), JSON))
@settings(max_examples=300, deadline=None)
def test_any_object_is_a_form_or_a_400_that_names_a_field_it_has(value: dict[str, Any]) -> None:
    error = fault_of(lambda: parse_value(value, Form))
    if error is not None:
        assert error.status == 400
        assert error.param is not None
        assert error.param.split(".")[0] in value


def test_a_good_body_is_its_values() -> None:
    form = parse(b'{"count": 5, "share": 1, "stop": ["a"], "ids": [[1], [2]], "count": 6}', Form)
    assert (form.count, form.share, form.stop, form.ids) == (6, 1.0, ["a"], [[1], [2]])


def test_of_a_million_ids_the_first_wrong_one_ends_the_search() -> None:
    class Counted(BaseModel):
        ids: TokenIds

    with pytest.raises(ApiError, match=r"ids\.0: "):
        parse_value({"ids": ["x"] * 1_000_000}, Counted)


def test_a_body_beyond_the_bound_is_a_413_before_it_is_read_to_its_end() -> None:
    part = bytes(1 << 20)
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": part, "more_body": True}

    with pytest.raises(ApiError) as caught:
        asyncio.run(read_body(Request({"type": "http"}, receive)))
    assert caught.value.status == 413
    assert taken == MAX_BODY // len(part) + 1


def test_unknown_fields_are_warnings_and_when_strict_a_refusal() -> None:
    assert unknown_fields(None, strict=True) == []
    warnings = unknown_fields({"b": 1, "a": None}, strict=False)
    assert [warning.split()[0] for warning in warnings] == ["a", "b"]
    assert fault(lambda: unknown_fields({"b": 1, "a": 2}, strict=True)).param == "a"


@pytest.mark.parametrize("value", [None, False, 0])
def test_a_field_that_asks_for_nothing_is_harmless(value: object) -> None:
    refuse_unsupported({"best_of": (value, False)})


def test_a_field_that_is_not_served_is_refused_by_name() -> None:
    assert fault(lambda: refuse_unsupported({"a": (None, 1), "b": (2, 1)})).param == "b"


def test_what_a_form_does_not_know_is_told_from_what_it_does_not_serve() -> None:
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")
        known: int = 0

    form = parse_value({"known": 1, "served": None, "other": 2}, Open)
    assert unknown_in(form, {"served": 1}, "at.") == {"at.other": 2}
    form = parse_value({"served": 2}, Open)
    assert fault(lambda: unknown_in(form, {"served": 1}, "at.")).param == "at.served"


def test_a_refusal_speaks_of_the_field_that_the_client_wrote() -> None:
    words = {"max_new_tokens": "max_tokens", "prompt": "text"}
    message = "prompt 9 + max_new_tokens 5 exceed 10: lower max_new_tokens or the prompt"
    with pytest.raises(RequestRefused) as caught, in_words_of_the_client(words):
        raise TooLong(message, "max_new_tokens")
    assert caught.value.param == "max_tokens"
    assert str(caught.value) == "text 9 + max_tokens 5 exceed 10: lower max_tokens or the text"
    with pytest.raises(RequestRefused, match=r"^seed is wrong$"), in_words_of_the_client(words):
        raise RequestRefused("seed is wrong", "seed")


def test_a_described_body_holds_its_definitions_itself() -> None:
    for forms in ([Form], [Form, Part]):
        body = described(*forms)["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        assert "$ref" not in str(schema)
        assert "$defs" not in str(schema)
    shown = described(Form)["requestBody"]["content"]["application/json"]["schema"]
    assert shown["properties"].keys() == Form.model_fields.keys()
    assert shown["properties"]["part"]["anyOf"][0]["properties"]["text"]["type"] == "string"


def test_a_described_route_says_how_it_streams_and_whether_it_needs_a_body() -> None:
    shown = described(Part, required=False, streams=["text/event-stream"])
    assert shown["requestBody"]["required"] is False
    assert list(shown["responses"]["200"]["content"]) == ["text/event-stream"]


def test_a_form_that_wants_one_of_its_fields_says_so_and_stays_as_open_as_it_was() -> None:
    class Either(bodies.Form):
        model_config = one_of("text", "ids")

        text: str | None = None
        ids: list[int] | None = None

    described_form = Either.model_json_schema()
    assert described_form["anyOf"] == [{"required": ["text"]}, {"required": ["ids"]}]
    assert parse(b'{"other": 1}', Either).model_extra == {"other": 1}
