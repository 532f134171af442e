"""Whole answers, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response


def json_reply(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`content`, which holds what JSON can say."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")
