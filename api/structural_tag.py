"""SGLang's structural tags: free text, in which a trigger begins a stretch of JSON.

{"type": "structural_tag", "structures": [{"begin", "schema", "end"}], "triggers": [text]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from api.errors import refused
from backend.grammar_forms import Tag, tag_grammar
from backend.interface import Grammar


def read_tag(value: Any, param: str) -> Grammar:
    """The grammar of a structural tag, an object or its JSON text. Raises ApiError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise refused(f"{param} is not JSON: {error}", param) from None
    if not isinstance(value, dict):
        raise refused(f"{param} must be an object", param)
    return tag_grammar(list(_tags(value, param)))


def _tags(value: Mapping[str, Any], param: str) -> Iterator[Tag]:
    kind = value.get("type", "structural_tag")
    if kind != "structural_tag":
        raise refused(f"{param}.type must be structural_tag, got {kind!r:.40}", f"{param}.type")
    for name in value:
        if name not in ("type", "structures", "triggers"):
            wanted = "give structures and triggers"
            raise refused(f"{param}.{name} is not served here: {wanted}", f"{param}.{name}")
    triggers = value.get("triggers")
    if not _are_texts(triggers):
        raise refused(f"{param}.triggers must be a list of texts", f"{param}.triggers")
    structures = value.get("structures")
    if not isinstance(structures, list) or not structures:
        raise refused(f"{param}.structures must be a list of objects", f"{param}.structures")
    for place, each in enumerate(structures):
        yield _read(each, value["triggers"], f"{param}.structures.{place}")


def _are_texts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, str) and each for each in value)
    )


def _read(value: Any, triggers: list[str], param: str) -> Tag:
    """One structure."""
    if not isinstance(value, dict) or set(value) - {"begin", "schema", "end"}:
        raise refused(f"{param} must be an object of begin, schema and end", param)
    for name in ("begin", "end"):
        if not isinstance(value.get(name, ""), str):
            raise refused(f"{param}.{name} must be a text", f"{param}.{name}")
    begin: str = value.get("begin", "")
    end: str = value.get("end", "")
    starting = [trigger for trigger in triggers if begin.startswith(trigger)]
    if len(starting) != 1:
        raise refused(f"{param}.begin must start with one of the triggers", f"{param}.begin")
    schema = value.get("schema", True)
    if not isinstance(schema, dict | bool):
        raise refused(f"{param}.schema must be an object", f"{param}.schema")
    return Tag(starting[0], begin, schema, end)
