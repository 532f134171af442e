"""How deep a JSON schema goes, what it refers to included.

Asked before a schema is compiled: llguidance's compiler calls itself for each level, and where its
stack ends so does the process. A stack of 8 MiB ends at 2,700 levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias
from urllib.parse import unquote

from backend.interface import RequestRefused

MAX_LEVELS = 1000  # objects and lists within each other

Level: TypeAlias = "dict[str, Any] | list[Any]"


def refuse_too_deep(schema: dict[str, Any]) -> None:
    """Raise RequestRefused for a schema of more than MAX_LEVELS levels."""
    if _depth(schema) > MAX_LEVELS:
        raise RequestRefused(
            f"the JSON schema goes more than {MAX_LEVELS:,} levels deep, $ref followed",
            "json_schema",
        )


def _depth(root: dict[str, Any]) -> int:
    """Levels of the longest way down that enters none twice, or some number above MAX_LEVELS."""
    depths = {id(root): 1}  # of what is below; 1 while that is not known
    path: list[tuple[Level, Iterator[Level]]] = [(root, _within(root, root))]
    while path and len(path) <= MAX_LEVELS:
        level, rest = path[-1]
        inner = next(rest, None)
        if inner is None:
            path.pop()
            if path:
                _note(depths, path[-1][0], level)
        elif id(inner) in depths:
            _note(depths, level, inner)
        else:
            depths[id(inner)] = 1
            path.append((inner, _within(inner, root)))
    return len(path) or depths[id(root)]


def _note(depths: dict[int, int], level: Level, inner: Level) -> None:
    depths[id(level)] = max(depths[id(level)], depths[id(inner)] + 1)


def _within(level: Level, root: dict[str, Any]) -> Iterator[Level]:
    """The levels in a level, and what it refers to."""
    values = level.values() if isinstance(level, dict) else level
    yield from (each for each in values if isinstance(each, dict | list))
    reference = level.get("$ref") if isinstance(level, dict) else None
    if isinstance(reference, str):
        yield from _referred(root, reference)


def _referred(root: dict[str, Any], reference: str) -> Iterator[Level]:
    """What a JSON pointer within the schema (`#/$defs/a`) leads to, if it is a level."""
    found: Any = root
    for part in reference.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            return
    if isinstance(found, dict | list):
        yield found
