"""A burst of requests must not hold up those that are being answered.

To begin a request (parse, check, submit) takes the event loop a third of a millisecond; hundreds
that arrive together would take it for a hundred of them, and no token, probe or scrape would pass.
So a few begin in each turn of the loop, and the others wait in line.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

PER_TURN = 8


class Turnstile:
    """Middleware, outermost. Probes and scrapes, which are no POSTs, walk past."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._line: deque[asyncio.Future[None]] = deque()
        self._left = PER_TURN  # may still begin in this turn
        self._turning = False  # the next turn is on its way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await self._pass()
        await self._app(scope, receive, send)

    async def _pass(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn)
        if self._left:
            self._left -= 1
            return
        waiter = loop.create_future()
        self._line.append(waiter)
        await waiter

    def _turn(self) -> None:
        self._left = PER_TURN
        while self._line and self._left:
            waiter = self._line.popleft()
            if not waiter.done():  # whoever was cancelled has left the line
                self._left -= 1
                waiter.set_result(None)
        self._turning = bool(self._line)
        if self._turning:
            asyncio.get_running_loop().call_soon(self._turn)
