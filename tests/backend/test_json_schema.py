"""What of a JSON schema is refused, and that the refusal names the keyword and its place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backend.grammar import check_grammar
from backend.interface import Grammar, RequestRefused


def check(schema: Any) -> None:
    check_grammar(Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema)))


REFUSED: list[tuple[Any, str, str]] = [
    ({"uniqueItems": True, "type": "array"}, "uniqueItems", "$"),
    ({"properties": {"a": {"contains": {}}}}, "contains", "$.properties.a"),
    ({"items": {"not": {"type": "string"}}}, "not", "$.items"),
    ({"anyOf": [{}, {"if": True}]}, "if", "$.anyOf[1]"),
    ({"$defs": {"x": {"format": "phone"}}}, "format", "$.$defs.x"),
    ({"type": "string", "format": "unknown"}, "format", "$"),
    ({"$ref": "http://example.com/schema"}, "$ref", "$"),
    ({"$ref": "#anchor"}, "$ref", "$"),
    ({"allOf": [{"dependentRequired": {"a": ["b"]}}]}, "dependentRequired", "$.allOf[0]"),
    ({"propertyNames": {"pattern": "a"}}, "propertyNames", "$"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties", "$"),
    ({"type": "string", "contentEncoding": "base64"}, "contentEncoding", "$"),
    ({"type": "string", "nullable": True}, "nullable", "$"),
    ({"type": "object", "minProperties": 2}, "minProperties", "$"),
    ({"properties": {"a": {"$id": "http://example.com"}}}, "$id", "$.properties.a"),
    ({"x-guidance": {"lenient": True}}, "x-guidance", "$"),
    ({"invented": 1}, "invented", "$"),
]


@pytest.mark.parametrize(
    ("schema", "keyword", "place"), REFUSED, ids=[f"{case[1]}-{case[2]}" for case in REFUSED]
)
def test_what_cannot_be_honoured_is_refused_by_keyword_and_place(
    schema: Any, keyword: str, place: str
) -> None:
    with pytest.raises(RequestRefused) as refused:
        check(schema)
    assert f"`{keyword}` at {place}:" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "no JSON"),
        ("[" * 2000, "no JSON"),
        ("3", "at $"),
        ({"anyOf": [3]}, "at $.anyOf[0]"),
        ({"properties": []}, "`properties` at $: an object of schemas"),
        ({"anyOf": {}}, "`anyOf` at $: a list of schemas"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"enum": []}, "Unsatisfiable"),
        (False, "matched by nothing"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "#/$defs/nobody"}, "nobody"),
        ({"type": "object", "minProperties": 1, "properties": {"a": {}}}, "min/maxProperties"),
    ],
)
def test_what_is_wrong_with_a_schema_is_said(schema: Any, words: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        check(schema)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_schema_nested_too_deep_is_refused() -> None:
    deep: Any = {}
    for _ in range(100):
        deep = {"items": deep}
    with pytest.raises(RequestRefused, match="nested more than"):
        check(deep)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"title": "t", "description": "d", "default": 1, "examples": [1], "x-order": 3},
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "integer"},
        {"$id": "http://example.com/root", "type": "integer"},
        {"definitions": {"a": {"type": "integer"}}, "$ref": "#/definitions/a"},
        {"type": "object", "minProperties": 1},
        {"type": "object", "required": ["a", "b"], "minProperties": 2},
        {"properties": {"uniqueItems": {"type": "integer"}}},  # a name, not a keyword
        {"enum": [{"not": 1}], "default": {"if": 1}},  # values, not schemas
    ],
)
def test_what_can_be_honoured_or_says_nothing_passes(schema: Any) -> None:
    check(schema)
