"""What probes ask: may traffic come, and does work go on? Pure questions about the pool."""

from __future__ import annotations

import asyncio
import time

from api.answers import Ask
from api.service import Service, new_id
from backend.interface import Overloaded, SamplingParams, Unavailable
from engine.multi_device import PAUSED, REFUSALS, EnginePool

PROGRESS_LIMIT_S = 30.0  # longer than any step, and than any pause for building kernels
ANY_TOKEN = 0  # a prompt for nobody: every vocabulary has it
GENERATE_LIMIT_S = 20.0  # orchestrators give a probe 30 seconds at most, as a rule


def why_not_ready(service: Service) -> str | None:
    """Why no traffic should come; None: let it come."""
    pool = service.pool
    if pool.state in REFUSALS:
        return REFUSALS[pool.state]
    if not ready_replicas(pool):
        return "no engine is ready: they are being restarted"
    try:
        _ = service.model
    except Unavailable as error:
        return str(error)
    return None


def ready_replicas(pool: EnginePool) -> int:
    """How many engines serve."""
    return sum(replica.state == "ready" for replica in pool.replicas)


def why_stuck(pool: EnginePool, now: float) -> str | None:
    """Why a restart would help; None: work goes on, or there is none. `now` is monotonic."""
    if pool.state == "down":
        return REFUSALS["down"]
    if pool.paused:
        return None
    for replica in pool.replicas:
        if replica.inflight and replica.last_news is not None:
            silent = now - replica.last_news
            if silent > PROGRESS_LIMIT_S:
                return (
                    f"engine {replica.index} has {replica.inflight} requests and was silent for "
                    f"{silent:.0f} s"
                )
    if pool.waiting and not ready_replicas(pool):
        last = max((each.last_news for each in pool.replicas if each.last_news), default=now)
        if now - last > PROGRESS_LIMIT_S:
            return f"{pool.waiting} requests wait, for {now - last:.0f} s no engine was ready"
    return None


def health(service: Service) -> dict[str, object]:
    """All of it at once, for operators."""
    pool = service.pool
    not_ready, stuck = why_not_ready(service), why_stuck(pool, time.monotonic())
    return {
        "status": pool.state,
        "ready": not_ready is None,
        "progress": stuck is None,
        "paused": pool.paused,
        "replicas_ready": ready_replicas(pool),
        "replicas": len(pool.replicas),
        "reason": not_ready or stuck,
    }


async def generate_one_token(service: Service) -> None:
    """Really answer a request, for nobody. Raises Unavailable or BackendFailed when that fails."""
    if service.pool.paused:
        raise Unavailable(PAUSED)
    ask = Ask((ANY_TOKEN,), SamplingParams(max_new_tokens=1))
    try:
        answers = service.open(new_id("health"), [ask], owner="")
    except Overloaded as error:
        raise Unavailable(str(error)) from error
    try:
        (answer,) = await asyncio.wait_for(answers.whole(), GENERATE_LIMIT_S)
    except asyncio.TimeoutError:
        raise Unavailable(f"no token within {GENERATE_LIMIT_S:.0f} s") from None
    finally:
        answers.close()
    if not answer.token_ids:
        raise Unavailable("the request was aborted before its token")
