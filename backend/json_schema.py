"""What a JSON schema may ask of an answer here: a table of keywords, and a walk that holds a schema
against it.

Called by `backend/grammar.py` before a schema is compiled. llguidance refuses most of what it does
not do, and ignores the rest; what it would ignore is refused here, by name and place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from backend.interface import RequestRefused
from backend.narrow_schema import narrowed

NOT_SERVED = "it is not served here"
MAX_DEPTH = 64  # schemas within schemas

# Say something to readers and nothing to validators.
ANNOTATIONS = {
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly"),
    *("writeOnly", "$comment", "$schema", "$anchor", "$vocabulary", "discriminator", "xml"),
    "externalDocs",
}
# Honoured: the value holds no schema.
PLAIN = {
    *("type", "enum", "const", "required", "pattern", "minLength", "maxLength", "multipleOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"),
    "maxProperties",
}
# Honoured: the value is a schema, a list of schemas, or an object of schemas.
ONE = {"items", "additionalItems", "additionalProperties"}
MANY = {"anyOf", "allOf", "oneOf", "prefixItems"}
NAMED = {"properties", "patternProperties", "$defs", "definitions"}
KNOWN = ANNOTATIONS | PLAIN | ONE | MANY | NAMED
FORMATS = (
    *("date", "date-time", "duration", "email", "hostname"),
    *("ipv4", "ipv6", "time", "uri", "uuid"),
)


def read_schema(text: str) -> dict[str, Any]:
    """The schema in a JSON text, as an object, narrowed.

    Raises RequestRefused for what is no schema that can be honoured, naming keyword and place.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"the JSON schema is no JSON: {error}", "json_schema") from None
    _check(schema, "$", 0)
    if schema is False:
        raise RequestRefused("the JSON schema false is matched by nothing", "json_schema")
    return {} if schema is True else narrowed(schema)


def refusal(keyword: str, place: str, reason: str) -> RequestRefused:
    """The error for a keyword of the schema at `place` (`$.properties.a`)."""
    return RequestRefused(f"the JSON schema has `{keyword}` at {place}: {reason}", "json_schema")


def _check(schema: Any, place: str, depth: int) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise RequestRefused(
            f"the JSON schema has {json.dumps(schema)[:40]} at {place}: an object or a boolean is "
            "wanted",
            "json_schema",
        )
    if depth > MAX_DEPTH:
        raise RequestRefused(
            f"the JSON schema is nested more than {MAX_DEPTH} deep: use $ref", "json_schema"
        )
    for keyword, value in schema.items():
        special = SPECIAL.get(keyword)
        if special is not None:
            reason = special(value, schema, place)
            if reason is not None:
                raise refusal(keyword, place, reason)
        elif keyword not in KNOWN and not keyword.startswith("x-"):
            raise refusal(keyword, place, NOT_SERVED)
    for within, inner in _inner(schema, place):
        _check(inner, within, depth + 1)


def _inner(schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """The schemas within a schema, with their places."""
    for keyword, value in schema.items():
        here = f"{place}.{keyword}"
        if keyword in MANY or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise refusal(keyword, place, "a list of schemas is wanted")
            yield from ((f"{here}[{at}]", each) for at, each in enumerate(value))
        elif keyword in NAMED:
            if not isinstance(value, dict):
                raise refusal(keyword, place, "an object of schemas is wanted")
            yield from ((f"{here}.{name}", each) for name, each in value.items())
        elif keyword in ONE:
            yield here, value


def _reference(value: Any, schema: Mapping[str, Any], place: str) -> str | None:
    if isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return None
    return f"{value!r:.80} is not within this schema: only #/... is followed"


def _format(value: Any, schema: Mapping[str, Any], place: str) -> str | None:
    if value in FORMATS:
        return None
    return f"{value!r:.80} is not served here, these are: {', '.join(FORMATS)}"


def _identity(value: Any, schema: Mapping[str, Any], place: str) -> str | None:
    return None if place == "$" else "it may stand at the root only"


def _least_properties(value: Any, schema: Mapping[str, Any], place: str) -> str | None:
    # a key that came twice would count twice
    required = schema.get("required", ())
    known = len(set(required)) if isinstance(required, list) else 0
    if isinstance(value, int) and value <= max(1, known):
        return None
    return "more than 1 is served only up to the number of required properties"


# keyword -> why its value cannot be honoured: (value, its schema, place); None: it can
SPECIAL: dict[str, Callable[[Any, Mapping[str, Any], str], str | None]] = {
    "$ref": _reference,
    "$id": _identity,
    "format": _format,
    "minProperties": _least_properties,
    "nullable": lambda value, schema, place: (
        None if value is False else "it is not served here: write the type as a list with null"
    ),
    "x-guidance": lambda value, schema, place: NOT_SERVED,
}
