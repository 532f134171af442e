"""What an answer is bound to within what its JSON schema allows: what ends by itself.

A model that may add properties or digits for ever does. What matches the narrower schema matches
the wider one, too. vLLM and SGLang close objects by default as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LARGEST = (1 << 53) - 1  # of integers, that every reader of JSON holds

ANY_PROPERTY = {"additionalProperties", "patternProperties", "minProperties"}
COMBINING = {"allOf", "anyOf", "oneOf", "$ref"}
ASSERTING = {
    *("type", "enum", "const", "properties", "required", "items", "prefixItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", *ANY_PROPERTY),
}
OF_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}  # objects of them
LISTS = {"anyOf", "allOf", "oneOf", "prefixItems"}
SINGLE = {"items", "additionalItems", "additionalProperties"}

Schema = Mapping[str, Any]


def narrowed(schema: Schema) -> dict[str, Any]:
    """`schema`, which was checked, with objects that have no other properties than they name and
    integers of at most LARGEST, each where the schema does not say otherwise.

    As it is, where schemas are combined: what one of them does not name another may.
    """
    return dict(schema) if _combines(schema) else _narrowed(schema)


def _inner(schema: Schema) -> Iterator[tuple[str, Any]]:
    """The values of a schema's keywords that hold schemas, each as a list."""
    for keyword, value in schema.items():
        if keyword in OF_SCHEMAS:
            yield keyword, list(value.values())
        elif isinstance(value, list) and keyword in LISTS | SINGLE:
            yield keyword, value
        elif keyword in SINGLE:
            yield keyword, [value]


def _combines(schema: Any) -> bool:
    """Whether a value must match two schemas at once, anywhere."""
    if not isinstance(schema, Mapping):
        return False
    combined = schema.keys() & COMBINING
    if len(combined) + bool(schema.keys() & ASSERTING) > 1 and combined:
        return True
    if len(schema.get("allOf", ())) > 1:
        return True
    return any(_combines(each) for _, inner in _inner(schema) for each in inner)


def _narrowed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for keyword, inner in _inner(schema):
        value, each = schema[keyword], [_narrowed(one) for one in inner]
        if isinstance(value, Mapping) and keyword in OF_SCHEMAS:
            found[keyword] = dict(zip(value, each, strict=True))
        else:
            found[keyword] = each if isinstance(value, list) else each[0]
    return found | _closing(schema) | _bounding(schema)


def _closing(schema: Schema) -> dict[str, Any]:
    """What closes an object that names its properties."""
    named, required = schema.get("properties", {}), schema.get("required", [])
    closes = (
        bool(named) and isinstance(required, list) and all(each in list(named) for each in required)
    )
    return {"additionalProperties": False} if closes and not schema.keys() & ANY_PROPERTY else {}


def _bounding(schema: Schema) -> dict[str, int]:
    """What bounds an integer on the sides that are open."""
    types = schema.get("type")
    integers = types == "integer" or (isinstance(types, list) and "integer" in types)
    if not integers or schema.keys() & {"enum", "const"}:
        return {}
    lower = [schema[each] for each in ("minimum", "exclusiveMinimum") if each in schema]
    upper = [schema[each] for each in ("maximum", "exclusiveMaximum") if each in schema]
    within = all(isinstance(each, int) and abs(each) < LARGEST for each in (*lower, *upper))
    if not within or (lower and upper):
        return {}
    return {
        **({} if lower else {"minimum": -LARGEST}),
        **({} if upper else {"maximum": LARGEST}),
    }
