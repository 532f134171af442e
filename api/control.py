"""The operator's verbs, once, for the control socket and for `POST /control`.

A command is one JSON object: `cmd` names the verb, the rest are its arguments. Every verb can be
repeated without harm and ends within its timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from api import health, reports
from api.auth import fingerprint
from api.bodies import parse_value
from api.errors import ApiError, api_error, refused
from api.service import Service
from backend.interface import EngineError
from config import LogLevel
from engine.log import start_log
from engine.multi_device import PauseMode

MOST = 1 << 31  # of any count in a command
MAX_DRAIN_WAIT_S = 3600.0
QUICK_S, STEPS_S, WARM_S = 10.0, 60.0, 600.0  # timeouts: STEPS_S for what waits for steps

Answer: TypeAlias = dict[str, Any]


class Arguments(BaseModel):
    """What a verb is told. By itself: nothing."""

    model_config = ConfigDict(extra="forbid")


class Warm(Arguments):
    """Either decode steps of a throwaway sequence, or a prefix that is computed and kept."""

    tokens: int | None = Field(None, ge=1, le=MOST)
    prefix: str | None = Field(None, min_length=1)


class Drain(Arguments):
    """How long to wait for the requests that go on, in seconds."""

    wait: float = Field(0.0, ge=0, le=MAX_DRAIN_WAIT_S)


class Pause(Arguments):
    """What becomes of the requests that go on: they end, or stay where they are."""

    mode: PauseMode = "abort"


class Abort(Arguments):
    """Whose requests: those of one id, of one API key, or everybody's."""

    id: str | None = Field(None, min_length=1)
    key: str | None = Field(None, min_length=1)
    all: bool = False


class Limit(Arguments):
    """Limits to be changed; 0: no bound. One that is not named stays as it is."""

    max_inflight_total: int | None = Field(None, ge=0, le=MOST)
    max_inflight_per_engine: int | None = Field(None, ge=0, le=MOST)
    max_queued: int | None = Field(None, ge=0, le=MOST)


class Log(Arguments):
    """From which level on this process logs."""

    level: LogLevel


class Control:
    """Runs commands on one server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.pool = service.pool

    async def run(self, command: Mapping[str, Any]) -> Answer:
        """The answer to a command; `{"error": kind, "message": one line}` when it is wrong or
        fails in a way that we know of.
        """
        try:
            return await self.call(command)
        except (ApiError, EngineError) as error:
            answer = api_error(error)
            return {"error": answer.code or "invalid_argument", "message": answer.message}

    async def call(self, command: Mapping[str, Any]) -> Answer:
        """The same. Raises ApiError and EngineError."""
        arguments = dict(command)
        name = arguments.pop("cmd", None)
        verb = VERBS.get(name) if isinstance(name, str) else None
        if verb is None:
            wanted = ", ".join(VERBS)
            raise ApiError(400, f"cmd must be one of {wanted}", param="cmd", code="unknown_command")
        try:
            parsed = parse_value(arguments, verb.arguments)
            return await asyncio.wait_for(verb.run(self, parsed), verb.timeout)
        except asyncio.TimeoutError:
            message = f"{name} took longer than {verb.timeout:.0f} s"
            raise ApiError(504, message, "timeout_error", code="timeout") from None

    async def metrics(self, _: Arguments) -> Answer:
        """Totals, rolling averages, requests running and waiting."""
        return reports.metrics(self.service)

    async def stats(self, _: Arguments) -> Answer:
        """What `GET /stats` says."""
        return reports.stats(self.service)

    async def health(self, _: Arguments) -> Answer:
        """What the health routes say, all at once."""
        return health.health(self.service)

    async def warm(self, wanted: Warm) -> Answer:
        """Run decode steps, or fill the cache with a prefix, on every replica that serves."""
        _exactly_one(wanted)
        prompt, new, name = [health.ANY_TOKEN], wanted.tokens or 0, "tokens"
        if wanted.prefix is not None:
            (prompt,) = await self.service.encode([wanted.prefix], "prefix")
            new, name = 0, "prefix"
        spec = self.pool.spec
        needed, room = len(prompt) + new, min(spec.max_model_len, spec.pages * spec.page_tokens)
        if needed > room:
            raise refused(f"{name}: {needed:,} tokens do not fit, {room:,} do", name)
        replicas = health.ready_replicas(self.pool)
        warmed = await self.pool.warm(prompt, new)
        return {"ok": True, "warmed_tokens": warmed, "replicas": replicas}

    async def drain(self, wanted: Drain) -> Answer:
        """Refuse new requests and let those accepted end. Says how many are left."""
        self.pool.drain()
        await self.pool.drained(wanted.wait)
        return self._work()

    async def pause(self, wanted: Pause) -> Answer:
        """Generate nothing until `continue`; new requests wait. Says how many were ended."""
        return {"aborted": await self.pool.pause(wanted.mode), **self._work()}

    async def go_on(self, _: Arguments) -> Answer:
        """Generate again, from where it was."""
        await self.pool.go_on()
        return self._work()

    async def resume(self, _: Arguments) -> Answer:
        """Accept requests again."""
        self.pool.resume()
        return self._work()

    def _work(self) -> Answer:
        pool = self.pool
        return {
            "ok": True,
            "status": pool.state,
            "running": pool.running,
            "waiting": pool.waiting,
        }

    async def abort(self, wanted: Abort) -> Answer:
        """End requests with finish "abort". Says how many: none the second time."""
        _exactly_one(wanted)
        owner = None if wanted.key is None else fingerprint(wanted.key)
        return {"ok": True, "aborted": self.pool.abort(request_id=wanted.id, owner=owner)}

    async def flush(self, _: Arguments) -> Answer:
        """Give up every cached prefix that is not in use."""
        return {"ok": True, "pages": await self.pool.flush()}

    async def set(self, wanted: Limit) -> Answer:
        """Change limits, all that are named or none. Says which are now in force."""
        changes = wanted.model_dump(exclude_none=True)
        if not changes:
            raise refused(f"set wants one or more of {', '.join(Limit.model_fields)}")
        self.pool.limits = replace(self.pool.limits, **changes)
        return {"ok": True, "limits": asdict(self.pool.limits)}

    async def log_level(self, wanted: Log) -> Answer:
        """Change what this process logs; engines keep the level that they started with."""
        start_log(wanted.level)
        return {"ok": True, "level": wanted.level}


@dataclass(frozen=True, slots=True)
class Verb:
    """How a command is understood, run, and given up."""

    arguments: type[Arguments]
    run: Callable[[Control, Any], Awaitable[Answer]]
    timeout: float = QUICK_S


VERBS: dict[str, Verb] = {
    "metrics": Verb(Arguments, Control.metrics),
    "warm": Verb(Warm, Control.warm, WARM_S),
    "stats": Verb(Arguments, Control.stats),
    "health": Verb(Arguments, Control.health),
    "drain": Verb(Drain, Control.drain, MAX_DRAIN_WAIT_S + QUICK_S),
    "resume": Verb(Arguments, Control.resume),
    "pause": Verb(Pause, Control.pause, STEPS_S),
    "continue": Verb(Arguments, Control.go_on, STEPS_S),
    "abort": Verb(Abort, Control.abort),
    "flush": Verb(Arguments, Control.flush, STEPS_S),
    "set": Verb(Limit, Control.set),
    "log_level": Verb(Log, Control.log_level),
}


def _described(name: str, verb: Verb) -> dict[str, Any]:
    schema = verb.arguments.model_json_schema()
    fields = {"cmd": {"const": name}, **schema.get("properties", {})}
    return {**schema, "properties": fields, "required": ["cmd", *schema.get("required", ())]}


COMMANDS = [_described(name, verb) for name, verb in VERBS.items()]  # the JSON schema of each


def _exactly_one(wanted: Arguments) -> None:
    """Raise ApiError unless exactly one of the arguments is given."""
    if sum(map(bool, wanted.model_dump().values())) != 1:
        names = list(type(wanted).model_fields)
        raise refused(f"exactly one of {', '.join(names)} is wanted", names[0])
