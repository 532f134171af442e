"""What an answer took, told to a client that asks with `"receipt": true`.

Times are the front's; steps, batch and yields are the engine's own count, which comes with its
finish. Where that is not known (the backend does not count, or the answer was ended from this side
by a stop string or an abortion) they are null, and `computed_tokens` is what a plain run computes.
"""

from __future__ import annotations

from typing import Any

from api.answers import Answer


def receipt(answer: Answer) -> dict[str, Any]:
    """Of an ended answer. Times are in seconds; what it never came to is null."""
    live, work = answer.live, answer.live.work
    return {
        "queue_s": _between(live.submission.arrival, live.placed or live.ended),
        "prefill_s": _between(live.placed, live.first_token or live.ended),
        "decode_s": _between(live.first_token, live.ended),
        "cached_tokens": answer.cached_tokens,
        "computed_tokens": answer.prompt_tokens - answer.cached_tokens
        if work is None
        else work.computed,
        "steps": work and work.steps,
        "mean_batch": work.rows / work.steps if work and work.steps else None,
        "yields": work and work.yields,
        "replica": live.replica,
    }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
