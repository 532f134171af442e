"""What an answer took, told to a client that asks with `"receipt": true`."""

from __future__ import annotations

from typing import Any

from api.answers import Answer


def receipt(answer: Answer) -> dict[str, Any]:
    """Of a finished answer. Times are in seconds."""
    live = answer.live
    arrival = live.submission.arrival
    placed = live.placed if live.placed is not None else live.ended
    first = live.first_token
    return {
        "queue_s": None if placed is None else placed - arrival,
        "prefill_s": None if first is None or placed is None else first - placed,
        "decode_s": None if first is None or live.ended is None else live.ended - first,
        "cached_tokens": answer.cached_tokens,
        "computed_tokens": answer.prompt_tokens - answer.cached_tokens + answer.completion_tokens,
        "replica": live.replica,
    }
