"""The turnstile: a few requests begin in a turn of the loop, in order, and probes walk past."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope, Send

from api.turnstile import PER_TURN, Turnstile


class Begun:
    """An app that notes who began."""

    def __init__(self) -> None:
        self.order: list[int | str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.order.append(scope["who"])


async def nothing() -> Message:
    return {"type": "http.disconnect"}


async def nowhere(message: Message) -> None:
    pass


def scope(who: int | str, method: str = "POST") -> Scope:
    return {"type": "http", "method": method, "who": who}


def test_a_burst_begins_a_few_at_a_turn_in_order() -> None:
    async def scenario() -> None:
        app = Begun()
        turnstile = Turnstile(app)
        tasks = [
            asyncio.ensure_future(turnstile(scope(number), nothing, nowhere))
            for number in range(5 * PER_TURN)
        ]
        before = 0
        while len(app.order) < len(tasks):
            await asyncio.sleep(0)
            assert len(app.order) - before <= PER_TURN
            before = len(app.order)
        assert app.order == list(range(len(tasks)))

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_a_probe_walks_past_the_line_and_who_left_it_holds_up_nobody() -> None:
    async def scenario() -> None:
        app = Begun()
        turnstile = Turnstile(app)
        tasks = [
            asyncio.ensure_future(turnstile(scope(number), nothing, nowhere))
            for number in range(3 * PER_TURN)
        ]
        await asyncio.sleep(0)
        for task in tasks[PER_TURN : 2 * PER_TURN]:
            task.cancel()
        await turnstile(scope("probe", "GET"), nothing, nowhere)
        assert app.order.index("probe") <= PER_TURN
        await asyncio.gather(*tasks, return_exceptions=True)
        rest = [who for who in app.order if who != "probe"]
        assert rest == [*range(PER_TURN), *range(2 * PER_TURN, 3 * PER_TURN)]

    asyncio.run(asyncio.wait_for(scenario(), 5))
