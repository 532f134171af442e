"""Whole answers, as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from starlette.responses import Response

SLICE = 64  # entries written at a time, each with as many as 20 others: a few milliseconds

Entry = TypeVar("Entry")


def json_reply(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`content`, which holds what JSON can say."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def warnings_entry(warnings: Sequence[str]) -> dict[str, Any]:
    """The entry of an answer that holds what the client is told; none where there is nothing."""
    return {"warnings": warnings} if warnings else {}


async def written(
    entries: Sequence[Entry], lists: Callable[[Sequence[Entry]], Mapping[str, Sequence[Any]]]
) -> dict[str, orjson.Fragment]:
    """Long lists of an answer as JSON, by name: `lists` says what some entries add to each.

    Written slice by slice, so that others have their turn meanwhile.
    """
    parts: dict[str, list[bytes]] = {name: [] for name in lists(entries[:0])}
    for start in range(0, len(entries), SLICE):
        for name, more in lists(entries[start : start + SLICE]).items():
            parts[name].append(orjson.dumps(more)[1:-1])
        await asyncio.sleep(0)
    return {name: orjson.Fragment(b"[%b]" % b",".join(parts[name])) for name in parts}
