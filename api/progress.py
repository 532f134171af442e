"""How long it still takes, told in a stream of server-sent events until the first piece comes.

    : queued position=3 est_wait=1.2        third in line, seconds
    : prefill 4096/16384                    prompt tokens known to the device, and all of them

Comments, which an EventSource skips. For `api/streaming.py`, where the request asked for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from api.answers import Answer, Answers, Piece

PERIOD_S = 1.0  # between two looks


async def first_pieces(
    answers: Answers, tell: Callable[[bytes], Awaitable[None]]
) -> list[tuple[Answer, Piece]]:
    """Wait for the first pieces; meanwhile `tell` what has changed, every PERIOD_S at most."""
    coming = asyncio.ensure_future(answers.pieces())
    told = b""
    try:
        while not coming.done():
            comment = progress_of(answers)
            if comment and comment != told:
                await tell(comment)
                told = comment
            await asyncio.wait((coming,), timeout=PERIOD_S)
        return coming.result()
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)  # it does not outlive the stream


def progress_of(answers: Answers) -> bytes:
    """Of the first answer that has not begun; empty when each has."""
    waiting = (each for each in answers.all if not (each.live.received or each.live.finish))
    answer = next(waiting, None)
    if answer is None:
        return b""
    place = answers.pool.place_of(answer.live)
    if place is not None:
        return b": queued position=%d est_wait=%.1f\n\n" % place
    known = max(answer.live.prefilled, answer.cached_tokens)
    return b": prefill %d/%d\n\n" % (known, answer.prompt_tokens)
