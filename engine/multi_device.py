"""The pool of engines: starts them, watches them, and speaks for them all.

Owned by the server, on its event loop. Requests are the dispatcher's, processes the supervisors';
here is what concerns the whole: the state, draining, warming, flushing, the end.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from backend.interface import (
    BackendFailed,
    BackendSpec,
    Finish,
    Load,
    SamplingParams,
    StartFailed,
    Submission,
    Unavailable,
)
from config import AdaptiveSettings, BackendSettings, PoolSettings, QueueSettings
from engine.cache_history import Explanation, Question
from engine.devices import plan_replicas
from engine.dispatcher import ABORTED, Dispatcher, Limits
from engine.live_request import LiveRequest
from engine.replica import Replica
from engine.statistics import Statistics
from engine.supervisor import ReplicaState, Supervisor
from ipc.messages import Step

logger = logging.getLogger(__name__)

PoolState = Literal["starting", "ready", "paused", "draining", "down"]
PauseMode = Literal["abort", "in_place"]

REFUSALS: dict[PoolState, str] = {
    "starting": "the engines are starting: try again in a moment",
    "draining": "the server is draining: it takes no new requests",
    "down": "every engine is down: see the server's log",
}
CLOSED = Finish("abort", message="the server has stopped")
PAUSE = Finish("abort", message="generation was paused")
PAUSED = "generation is paused: continue it first"


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica, for whoever looks."""

    index: int
    device: str
    state: ReplicaState
    inflight: int  # requests given to it and not ended
    restarts: int
    pid: int | None
    load: Load | None  # of its last step; None until there was one
    last_news: float | None  # time.monotonic() of its last step, or when it got work while idle


class EnginePool:
    """Every engine of this server. A `Watcher` of their supervisors."""

    def __init__(
        self,
        pool: PoolSettings,
        adaptive: AdaptiveSettings,
        queue: QueueSettings,
        backend: BackendSettings,
        statistics: Statistics,
    ) -> None:
        self.statistics = statistics
        self._settings = pool
        self._backend = backend
        self._dispatcher = Dispatcher(pool, adaptive, queue, statistics)
        self._supervisors: list[Supervisor] = []
        self._specs: dict[int, BackendSpec] = {}  # as each engine's last start said
        self._first: asyncio.Future[BackendSpec] = asyncio.get_running_loop().create_future()
        self._prefixes: list[Submission] = []
        self._draining = False

    # What there is

    @property
    def spec(self) -> BackendSpec:
        """What every engine can do: that of the engine with the fewest pages. Raises Unavailable
        before the first one is ready.
        """
        if not self._specs:
            raise Unavailable(REFUSALS["starting"])
        return min(self._specs.values(), key=lambda spec: spec.pages)

    @property
    def state(self) -> PoolState:
        """What a new request would meet. "paused": it is taken, and waits. "down": no engine serves
        and none is coming back.
        """
        if self._draining:
            return "draining"
        if self._dispatcher.engines:
            return "paused" if self.paused else "ready"
        return "down" if self._is_down else "starting"

    @property
    def _is_down(self) -> bool:
        return {each.state for each in self._supervisors} == {"down"}

    @property
    def paused(self) -> bool:
        """Whether nothing is generated until `go_on`, whatever else is the case."""
        return self._dispatcher.held

    @property
    def waiting(self) -> int:
        """Requests that no engine has yet."""
        return self._dispatcher.waiting

    @property
    def running(self) -> int:
        """Requests given to engines and not ended."""
        return self._dispatcher.running

    @property
    def limits(self) -> Limits:
        """The bounds in force. Setting them takes effect at once."""
        return self._dispatcher.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._dispatcher.limits = limits

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """Every replica, by index."""
        return [self._status(each) for each in self._supervisors]

    def _status(self, supervisor: Supervisor) -> ReplicaStatus:
        serving = self._dispatcher.on(supervisor.index)
        times = (supervisor.last_step, serving.busy_since if serving else None)
        return ReplicaStatus(
            supervisor.index,
            self._device(supervisor),
            supervisor.state,
            len(serving.running) if serving else 0,
            supervisor.restarts,
            supervisor.replica.pid,
            supervisor.load,
            max((time for time in times if time is not None), default=None),
        )

    def _device(self, supervisor: Supervisor) -> str:
        """As planned; where the engine chose by itself, as it said."""
        planned, spec = supervisor.replica.plan.device, self._specs.get(supervisor.index)
        return spec.device if spec is not None and planned == "auto" else planned

    # Requests

    def submit(self, requests: Sequence[LiveRequest]) -> list[str]:
        """Accept the requests, all or none; their `notify` is called from now on.

        Returns warnings for the client: what was asked for and is not given. Raises RequestRefused,
        Overloaded or Unavailable.
        """
        self._refuse_unless_ready()
        spec = self.spec
        for request in requests:
            spec.check(request.submission)
        return self._dispatcher.submit(requests)

    def _refuse_unless_ready(self) -> None:
        state = self.state
        if state in REFUSALS:
            raise Unavailable(REFUSALS[state])

    def end(self, request: LiveRequest, finish: Finish) -> None:
        """End a request from this side: a stop string was found, or nobody waits for it. One that
        has ended is left as it is.
        """
        self._dispatcher.end(request, finish)

    def place_of(self, request: LiveRequest) -> tuple[int, float] | None:
        """Where in line a request waits (1 is next), and the seconds it is expected to; None: it
        waits no more.
        """
        return self._dispatcher.place_of(request)

    def abort(
        self, *, request_id: str | None = None, owner: str | None = None, finish: Finish = ABORTED
    ) -> int:
        """End requests and tell who waits for them: those of one id, of one owner, or all of them.

        Returns how many.
        """
        return self._dispatcher.abort(request_id=request_id, owner=owner, finish=finish)

    # A `Watcher`

    def engine_phase(self, index: int, name: str, seconds: float) -> None:
        """A phase of an engine's start has ended."""
        self.statistics.phase(index, name, seconds)

    def engine_ready(self, index: int, spec: BackendSpec) -> None:
        """An engine serves: it is given work."""
        self._specs[index] = spec
        self._dispatcher.engine_ready(index, spec, self._supervisors[index].replica.send)
        self._warm_prefixes(index)
        if not self._first.done():
            self._first.set_result(spec)

    def engine_step(self, index: int, step: Step) -> None:
        """An engine brought news."""
        self._dispatcher.step(index, step)

    def engine_failed(self, index: int, error: StartFailed) -> None:
        """An engine did not start. If it is the first we hear of any, the server cannot start."""
        if not self._first.done():
            self._first.set_exception(error)
        else:
            logger.error("engine %d did not start: %s", index, error)

    def engine_lost(self, index: int, reason: str) -> None:
        """An engine that served is gone."""
        logger.error("engine %d is lost: %s", index, reason)
        self.statistics.restarted(index)
        self._dispatcher.engine_lost(index, reason)

    def engine_down(self, index: int) -> None:
        """An engine does not come back."""
        logger.error("engine %d is down: it failed too often in a row", index)
        if self._is_down:
            self._dispatcher.end_waiting(REFUSALS["down"])

    # The whole

    async def start(self) -> None:
        """Begin to start every engine. Raises StartFailed when the machine has not what was asked
        for.
        """
        if self._settings.mode == "cache_aware" and not self._backend.cache.prefix:
            raise StartFailed(
                "SCHEDULER_MODE=cache_aware needs PREFIX_CACHE=1: without it no engine caches"
            )
        plans = await asyncio.to_thread(
            plan_replicas, self._settings, self._backend.device, self._backend.impl
        )
        self._supervisors = [Supervisor(Replica(plan), self) for plan in plans]
        for supervisor in self._supervisors:
            supervisor.start()

    async def ready(self) -> BackendSpec:
        """Wait for the first engine. Raises StartFailed with one line."""
        return await asyncio.shield(self._first)

    async def warm(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Run a prompt on every replica that serves, for nobody.

        Returns the tokens generated, or where none are asked for those of the prompt that are now
        in the caches, all replicas together. Raises RequestRefused, Unavailable or BackendFailed.
        """
        self._refuse_unless_ready()
        if self.paused:
            raise Unavailable(PAUSED)
        done = asyncio.Event()
        submission = _nobodys(prompt, max_new_tokens)
        self.spec.check(submission)
        requests = [
            self._give(index, submission, lambda _: done.set())
            for index in self._dispatcher.engines
        ]
        while not all(request.finish for request in requests):
            await done.wait()
            done.clear()
        for finish in (request.finish for request in requests):
            if finish is not None and finish.reason != "length":
                raise BackendFailed(finish.message or f"warming ended with {finish.reason}")
        return sum(len(request.received) if max_new_tokens else len(prompt) for request in requests)

    def keep_warm(self, prefixes: Sequence[Sequence[int]]) -> None:
        """Compute prefixes on every engine that serves, and on those to come as soon as they do.

        Raises RequestRefused.
        """
        self._prefixes = [_nobodys(prefix, 0) for prefix in prefixes]
        for prefix in self._prefixes:
            self.spec.check(prefix)
        for index in self._dispatcher.engines:
            self._warm_prefixes(index)

    def _warm_prefixes(self, index: int) -> None:
        if self.paused:
            return  # `go_on` comes back to it
        for prefix in self._prefixes:
            self._give(index, prefix, lambda _: None)

    def _give(
        self, index: int, submission: Submission, notify: Callable[[LiveRequest], None]
    ) -> LiveRequest:
        """Hand an engine a copy of a submission that is nobody's."""
        id = f"{submission.id}-{secrets.token_hex(8)}"
        copy = replace(submission, id=id, arrival=time.monotonic())
        request = LiveRequest(copy, copy.id, "", notify)
        self._dispatcher.give(index, request)
        return request

    async def flush(self) -> int:
        """Give up every cached prefix that is not in use, on every replica. Returns the pages."""
        engines = self._dispatcher.engines
        for index in engines:
            self._dispatcher.history.flushed(index)
        serving = [self._supervisors[index].replica for index in engines]
        return sum(await asyncio.gather(*(replica.flush() for replica in serving)))

    async def explain(
        self, owner: str, namespace: str, ids: Sequence[int]
    ) -> Sequence[Explanation]:
        """What a prompt of `owner` would find in the cache of each replica that serves, and why
        not more. Raises Unavailable.
        """
        now = time.monotonic()
        question = Question(owner, namespace, tuple(ids), self.spec.page_tokens, now)
        return await self._dispatcher.history.explain(question, self._dispatcher.engines)

    async def pause(self, mode: PauseMode) -> int:
        """Generate nothing until `go_on`; new requests wait. Returns how many were ended.

        "abort": what is there ends, and when this returns no engine has a request. "in_place": it
        stays where it is, and when this returns no engine does a step. Raises BackendFailed when an
        engine is lost meanwhile; no new one is given work.
        """
        self._dispatcher.hold()
        if mode == "in_place":
            await self._pause_engines(True)
            return 0
        aborted = self._dispatcher.abort(finish=PAUSE)
        await self._pause_engines(False)  # who was paused in place must still let go
        await self._dispatcher.idle()
        return aborted

    async def go_on(self) -> None:
        """Generate again, from where it was. Raises as `pause` does."""
        self._dispatcher.release()
        for index in self._dispatcher.engines:
            self._warm_prefixes(index)
        await self._pause_engines(False)

    async def _pause_engines(self, paused: bool) -> None:
        serving = [self._supervisors[index].replica for index in self._dispatcher.engines]
        await asyncio.gather(*(replica.pause(paused) for replica in serving))

    def drain(self) -> None:
        """Refuse new requests; those accepted go on."""
        self._draining = True

    def resume(self) -> None:
        """Accept requests again."""
        self._draining = False

    async def drained(self, timeout: float) -> bool:
        """Wait until no request is left; False when `timeout` seconds were not enough."""
        if self._dispatcher.is_idle:
            return True
        try:
            await asyncio.wait_for(self._dispatcher.idle(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End every engine. What still runs ends with finish "abort"."""
        self.drain()
        self._dispatcher.abort(finish=CLOSED)
        await asyncio.gather(*(each.close() for each in self._supervisors))


def _nobodys(prompt: Sequence[int], max_new_tokens: int) -> Submission:
    """A submission that only warms."""
    sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    return Submission("warm", tuple(prompt), sampling, seed=0)
