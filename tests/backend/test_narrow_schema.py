"""What an answer is bound to within its schema: it ends, and it matches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backend.json_schema import read_schema
from backend.narrow_schema import LARGEST

OPEN_OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}}
CLOSED_OBJECT = {**OPEN_OBJECT, "additionalProperties": False}
ANY_INTEGER = {"type": "integer"}
BOUND_INTEGER = {**ANY_INTEGER, "minimum": -LARGEST, "maximum": LARGEST}


@pytest.mark.parametrize(
    ("schema", "narrow"),
    [
        (OPEN_OBJECT, CLOSED_OBJECT),
        (ANY_INTEGER, BOUND_INTEGER),
        ({**ANY_INTEGER, "minimum": 1}, {**ANY_INTEGER, "minimum": 1, "maximum": LARGEST}),
        (
            {**ANY_INTEGER, "exclusiveMaximum": 9},
            {**ANY_INTEGER, "exclusiveMaximum": 9, "minimum": -LARGEST},
        ),
        ({"type": ["null", "integer"]}, {**BOUND_INTEGER, "type": ["null", "integer"]}),
        ({"items": OPEN_OBJECT}, {"items": CLOSED_OBJECT}),
        ({"items": [OPEN_OBJECT, True]}, {"items": [CLOSED_OBJECT, True]}),
        ({"prefixItems": [ANY_INTEGER]}, {"prefixItems": [BOUND_INTEGER]}),
        ({"anyOf": [OPEN_OBJECT, ANY_INTEGER]}, {"anyOf": [CLOSED_OBJECT, BOUND_INTEGER]}),
        ({"additionalProperties": OPEN_OBJECT}, {"additionalProperties": CLOSED_OBJECT}),
        (
            {"$defs": {"x": OPEN_OBJECT}, "$ref": "#/$defs/x", "title": "X"},
            {"$defs": {"x": CLOSED_OBJECT}, "$ref": "#/$defs/x", "title": "X"},
        ),
    ],
)
def test_objects_are_closed_and_integers_bound(schema: Any, narrow: Any) -> None:
    assert read_schema(json.dumps(schema)) == narrow


@pytest.mark.parametrize(
    "schema",
    [
        {**OPEN_OBJECT, "additionalProperties": True},
        {**OPEN_OBJECT, "additionalProperties": {"type": "null"}},
        {**OPEN_OBJECT, "patternProperties": {"b": {}}},
        {**OPEN_OBJECT, "required": ["b"]},
        {"type": "object"},
        {"allOf": [OPEN_OBJECT, {"properties": {"b": {}}}]},
        {**OPEN_OBJECT, "anyOf": [{"properties": {"b": {}}}, {}]},
        {"$defs": {"x": OPEN_OBJECT}, "$ref": "#/$defs/x", "properties": {"b": {}}},
        {"items": {"allOf": [ANY_INTEGER, {"minimum": LARGEST * 2}]}},
        {**ANY_INTEGER, "enum": [LARGEST * 2]},
        {**ANY_INTEGER, "minimum": LARGEST * 2},
        {**ANY_INTEGER, "minimum": 0, "maximum": 9},
        {"type": "number"},
    ],
)
def test_what_says_otherwise_or_joins_schemas_is_left(schema: Any) -> None:
    assert read_schema(json.dumps(schema)) == schema


@pytest.mark.parametrize(
    "schema",
    [
        {**OPEN_OBJECT, "required": 5},
        {**OPEN_OBJECT, "required": {"a": 1}},
        {**OPEN_OBJECT, "required": [["a"], 3]},
        {**ANY_INTEGER, "minimum": "1"},
        {**ANY_INTEGER, "maximum": None},
        {"type": [["integer"]]},
    ],
)
def test_what_is_no_schema_is_left_for_the_parser_to_refuse(schema: Any) -> None:
    read_schema(json.dumps(schema))
