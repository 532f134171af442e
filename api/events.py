"""Media types of streams, and server-sent events as OpenAI and SGLang frame them."""

from __future__ import annotations

from typing import Any

import orjson

EVENT_STREAM = "text/event-stream"  # the media type
JSON_LINES = "application/x-ndjson"  # that of our own streams
DONE = b"data: [DONE]\n\n"  # after the last event


def event(content: Any) -> bytes:
    """One event that holds JSON."""
    return b"data: %b\n\n" % orjson.dumps(content)
