"""Server-sent events, as OpenAI and SGLang frame their streams."""

from __future__ import annotations

from typing import Any

import orjson

EVENT_STREAM = "text/event-stream"  # the media type
DONE = b"data: [DONE]\n\n"  # after the last event


def event(content: Any) -> bytes:
    """One event that holds JSON."""
    return b"data: %b\n\n" % orjson.dumps(content)
