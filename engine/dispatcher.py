"""Who waits and which engine answers: every request of the server, from its acceptance to its end.

Owned by the pool, on its event loop; knows engines by their index, their spec and a way to send.
Requests wait in one room; an engine has what it has rows for and a small look-ahead. Whatever
fails, each accepted request ends with exactly one finish.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from backend.interface import BackendSpec, Delta, Finish, RequestRefused
from config import AdaptiveSettings, PoolSettings, QueueSettings
from engine.cache_history import CacheHistory
from engine.live_request import LiveRequest
from engine.placement import Placement, open_placement
from engine.statistics import Statistics
from engine.waiting_room import LOOK_AHEAD, WaitingRoom
from ipc.messages import Cancel, FrontMessage, Step, Submit

logger = logging.getLogger(__name__)

ABORTED = Finish("abort", message="aborted")


@dataclass(slots=True)
class Limits:
    """What may be changed while the server runs; 0: no bound but the engines' rows."""

    max_inflight_total: int
    max_inflight_per_engine: int
    max_queued: int


@dataclass(eq=False, slots=True)
class Serving:
    """An engine that serves, and what it has been given."""

    spec: BackendSpec
    send: Callable[[FrontMessage], None]
    running: dict[str, LiveRequest] = field(default_factory=dict)
    busy_since: float | None = None  # time.monotonic() when it was last given work while idle

    @property
    def rows(self) -> int:
        """How many requests it takes at most."""
        return self.spec.max_running + LOOK_AHEAD

    def room(self, bound: int) -> int:
        """How many requests more it would take."""
        return max(0, min(bound or self.rows, self.rows) - len(self.running))


class Dispatcher:
    """Every request that is not ended."""

    def __init__(
        self,
        pool: PoolSettings,
        adaptive: AdaptiveSettings,
        queue: QueueSettings,
        statistics: Statistics,
    ) -> None:
        self._mode = pool.mode
        self._adaptive = adaptive
        self._statistics = statistics
        self._limits = Limits(
            pool.max_inflight_total, pool.max_inflight_per_engine, queue.max_queued
        )
        self.history = CacheHistory()
        self._room = WaitingRoom(queue)
        self._serving: dict[int, Serving] = {}  # by the engine's index
        self._placement: Placement | None = None  # made with the first engine
        self._live: dict[str, LiveRequest] = {}  # by submission id, until no engine knows it
        self._held = False
        self._names: Counter[tuple[str, str]] = Counter()  # how many answers go by each
        self._idle = asyncio.Event()
        self._idle.set()

    # What there is

    @property
    def engines(self) -> Sequence[int]:
        """The engines that serve."""
        return list(self._serving)

    @property
    def waiting(self) -> int:
        """Requests that no engine has yet."""
        return len(self._room)

    def on(self, index: int) -> Serving | None:
        """What an engine has been given; None: it does not serve."""
        return self._serving.get(index)

    @property
    def running(self) -> int:
        """Requests given to engines and not ended."""
        return sum(len(each.running) for each in self._serving.values())

    @property
    def limits(self) -> Limits:
        """The bounds in force."""
        return replace(self._limits)

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = replace(limits)
        self._room.bound = limits.max_queued
        self._dispatch(time.monotonic())

    @property
    def held(self) -> bool:
        """Whether everybody waits, whatever room there is."""
        return self._held

    def hold(self) -> None:
        """Give out nothing until `release`."""
        self._held = True

    def release(self) -> None:
        """Give out what waits. What engines had meanwhile is news from now on."""
        if not self._held:
            return
        self._held = False
        now = time.monotonic()
        for serving in self._serving.values():
            if serving.running:
                serving.busy_since = now
        self._dispatch(now)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._live

    async def idle(self) -> None:
        """Wait until no request is left."""
        await self._idle.wait()

    # Requests come and go

    def submit(self, requests: Sequence[LiveRequest]) -> list[str]:
        """Accept the requests, all or none; their `notify` is called from now on.

        Returns warnings for the client: what was asked for and is not given. Raises RequestRefused
        or Overloaded.
        """
        now = time.monotonic()
        warnings = self._shorten(requests)
        self._check(requests, now)
        for request in requests:
            self._accept(request)
            self._room.push(request.submission, now)
        self._dispatch(now)
        return warnings

    def _shorten(self, requests: Sequence[LiveRequest]) -> list[str]:
        """Lower the lengths asked for while the load is above the threshold."""
        rows = sum(each.spec.max_running for each in self._serving.values())
        if not self._adaptive.enabled or len(self._live) <= (self._adaptive.threshold or rows):
            return []
        warnings: dict[str, None] = {}  # answers of one prompt say it once
        for request in requests:
            sampling = request.submission.sampling
            asked = request.submission.max_new_tokens
            given = max(1, sampling.min_new_tokens, int(asked * self._adaptive.factor))
            if given < asked:
                sampling = replace(sampling, max_new_tokens=given)
                request.submission = replace(request.submission, sampling=sampling)
                warnings[
                    f"max_new_tokens was lowered from {asked} to {given}: the server is busy "
                    "(ADAPTIVE_MAX_NEW_TOKENS)"
                ] = None
        return list(warnings)

    def _check(self, requests: Sequence[LiveRequest], now: float) -> None:
        """Raise what speaks against taking them."""
        for request in requests:
            if request.name in self._names:
                raise RequestRefused(f"rid {request.request_id!r} is in use: choose another", "rid")
        bound = self._limits.max_queued
        most = bound + sum(each.rows for each in self._serving.values())
        if bound and len(requests) > most:
            raise RequestRefused(
                f"{len(requests):,} answers at once are more than the server ever holds "
                f"({most:,}): ask for fewer",
                "n",
            )
        self._room.check(len(requests), self._free_rows(), now)

    def _free_rows(self) -> int:
        """How many would leave the room at once."""
        if self._held:
            return 0
        rooms = sum(
            each.room(self._limits.max_inflight_per_engine) for each in self._serving.values()
        )
        bound = self._limits.max_inflight_total
        return min(rooms, max(0, bound - self.running)) if bound else rooms

    def place_of(self, request: LiveRequest) -> tuple[int, float] | None:
        """Where in line a request waits (1 is next), and the seconds it is expected to; None: an
        engine has it, or it has ended.
        """
        ahead = self._room.position(request.id) if request.replica is None else None
        if ahead is None:
            return None
        return ahead + 1, self._room.expected_wait(ahead + 1, time.monotonic())

    def _accept(self, request: LiveRequest) -> None:
        self._live[request.id] = request
        self._names[request.name] += 1
        self._idle.clear()
        self._statistics.accepted(request)

    def end(self, request: LiveRequest, finish: Finish) -> None:
        """End a request from this side: a stop string was found, or nobody waits for it. One that
        has ended is left as it is.
        """
        if request.finish is not None:
            return
        self._finish(request, finish)
        if request.replica is None:
            self._room.remove(request.id)
            self._forget(request)
        else:  # it keeps its row until the engine says so
            self._serving[request.replica].send(Cancel(request.id))

    def abort(
        self, *, request_id: str | None = None, owner: str | None = None, finish: Finish = ABORTED
    ) -> int:
        """End requests and tell who waits for them: those of one id, of one owner, or all of them.

        Returns how many.
        """
        found = [
            each
            for each in self._live.values()
            if request_id in (None, each.request_id) and owner in (None, each.owner)
        ]
        going = [each for each in found if each.finish is None]
        for request in going:
            self.end(request, finish)
            request.notify(request)
        return len(going)

    def _finish(self, request: LiveRequest, finish: Finish) -> None:
        request.finish = finish
        request.ended = time.monotonic()
        self._statistics.finished(request)

    def _forget(self, request: LiveRequest) -> None:
        """No engine knows it any more."""
        del self._live[request.id]
        self._names[request.name] -= 1
        if not self._names[request.name]:
            del self._names[request.name]
        if not self._live:
            self._idle.set()

    # Engines come and go

    def engine_ready(
        self, index: int, spec: BackendSpec, send: Callable[[FrontMessage], None]
    ) -> None:
        """An engine serves: it is given work."""
        if self._placement is None:
            self._placement = open_placement(self._mode, spec.page_tokens)
        self._serving[index] = Serving(spec, send)
        self._dispatch(time.monotonic())

    def engine_lost(self, index: int, reason: str) -> None:
        """An engine is gone: what it had ends with an error, what waits goes to the others."""
        serving = self._serving.pop(index, None)
        if serving is None or self._placement is None:
            return  # it never served
        self._placement.lost(index)
        self.history.lost(index)
        finish = Finish("error", message=f"the engine died: {reason}")
        for request in serving.running.values():
            self._forget(request)
            if request.finish is None:
                self._finish(request, finish)
                request.notify(request)
        self._dispatch(time.monotonic())

    def end_waiting(self, reason: str) -> None:
        """No engine will come: those who wait end with an error."""
        for submission in self._room.clear():
            self._give_up(self._live[submission.id], reason)

    def _give_up(self, request: LiveRequest, reason: str) -> None:
        """End a request that no engine has."""
        if self._placement is not None:
            self._placement.ended(request.id)
        self._forget(request)
        self._finish(request, Finish("error", message=reason))
        request.notify(request)

    def give(self, index: int, request: LiveRequest) -> None:
        """Accept a request for one engine, past the queue and its limits."""
        self._accept(request)
        self._send(index, request, time.monotonic())

    def _dispatch(self, now: float) -> None:
        """Give out what waits, first come first served, while there is an engine with room."""
        bound = self._limits.max_inflight_per_engine
        while self._placement is not None and self._free_rows():
            submission = self._room.next(now)
            if submission is None:
                return
            free = [index for index, each in self._serving.items() if each.room(bound)]
            index = self._placement.choose(submission, free)
            self._send(index, self._live[submission.id], now)

    def _send(self, index: int, request: LiveRequest, now: float) -> None:
        serving = self._serving[index]
        try:
            serving.send(Submit(request.submission))
        except Exception as error:  # a defect of ours, which is nobody else's misfortune
            logger.exception("request %s cannot be sent to an engine", request.id)
            self._give_up(request, f"internal error: {type(error).__name__}")
            return
        request.replica = index
        request.placed = now
        if not serving.running:
            serving.busy_since = now
        serving.running[request.id] = request
        self._statistics.placed(request)

    # Tokens come

    def step(self, index: int, step: Step) -> None:
        """An engine brought news of its requests."""
        assert self._placement is not None
        self._statistics.step(index, step)
        running = self._serving[index].running
        now = time.monotonic()
        if step.entered or step.evicted:
            self._placement.cached(index, step.entered, step.evicted)
            self.history.told(index, step.entered, step.evicted, now)
        for delta in step.deltas():
            request = running.get(delta.id)
            if request is None:
                continue
            if request.finish is None:
                self._feed(request, delta, now)
            if delta.finish is not None:
                del running[delta.id]
                self._forget(request)
                self._placement.ended(delta.id)
        if step.finishes:
            self._dispatch(now)

    def _feed(self, request: LiveRequest, delta: Delta, now: float) -> None:
        """Add news to a request that goes on."""
        if delta.prefilled is not None:
            request.prefilled = delta.prefilled
            return  # who wants to know looks by itself
        if delta.cached is not None:
            request.cached = delta.cached
            if delta.finish is None or delta.finish.reason != "abort":
                self.history.computed(request)
        if delta.tokens:
            self._add_tokens(request, delta, now)
        request.prompt_logprobs += delta.prompt_logprobs
        if delta.finish is not None:
            request.pooled, request.work = delta.pooled, delta.work
            self._finish(request, delta.finish)
        request.notify(request)

    def _add_tokens(self, request: LiveRequest, delta: Delta, now: float) -> None:
        self._statistics.received(request, len(delta.tokens), now)
        if request.first_token is None and self._placement is not None:
            request.first_token = now
            self._placement.began(request.id)
        request.last_token = now
        request.received += delta.tokens
        request.logprobs += delta.logprobs
