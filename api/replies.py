"""Whole answers, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response


def json_reply(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`content`, which holds what JSON can say."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def warnings_entry(warnings: Sequence[str]) -> dict[str, Any]:
    """The entry of an answer that holds what the client is told; none where there is nothing."""
    return {"warnings": warnings} if warnings else {}
