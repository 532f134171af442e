"""How busy each replica is, in SGLang's words, for routers that balance between servers.

Numbers are those of a replica's last step. A request that no replica has yet is counted beside
them: it will run on whichever has room first.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from api.errors import refused
from api.service import service_of
from engine.multi_device import EnginePool, ReplicaStatus

SECTIONS = ("core", "memory", "spec", "lora", "disagg", "queues", "all")  # ours has only the first

router = APIRouter(tags=["operations"])


@router.get("/v1/loads")
async def loads(
    request: Request,
    format: str = "json",
    include: str = "all",
    dp_rank: Annotated[int | None, Query(ge=0)] = None,
) -> dict[str, Any]:
    """Every replica's load, or with `dp_rank` one's."""
    pool = service_of(request).pool
    _check(format, include, dp_rank, len(pool.replicas))
    return {
        "timestamp": datetime.now(timezone.utc).isoformat(),
        "num_waiting_reqs": pool.waiting,
        "loads": [_load(pool, each) for each in pool.replicas if dp_rank in (None, each.index)],
    }


@router.get("/get_load")
async def old_loads(request: Request) -> list[dict[str, Any]]:
    """The same in the words of SGLang's older versions."""
    pool = service_of(request).pool
    return [
        {
            "dp_rank": load["dp_rank"],
            "num_reqs": load["num_running_reqs"] + load["num_waiting_reqs"],
            "num_waiting_reqs": load["num_waiting_reqs"],
            "num_tokens": load["num_used_tokens"],
        }
        for load in (_load(pool, each) for each in pool.replicas)
    ]


def _check(format: str, include: str, rank: int | None, replicas: int) -> None:
    """Raises ApiError for what is not known."""
    if format != "json":
        raise refused("format must be json: GET /metrics has Prometheus text", "format")
    for section in include.split(","):
        if section.strip() not in SECTIONS:
            raise refused(f"include must hold some of {', '.join(SECTIONS)}", "include")
    if rank is not None and rank >= replicas:
        raise refused(f"dp_rank must be below {replicas}", "dp_rank")


def _load(pool: EnginePool, replica: ReplicaStatus) -> dict[str, Any]:
    """Raises Unavailable before the first engine has told what it can hold."""
    spec, load = pool.spec, replica.load
    running = load.running if load else 0
    used, total = (load.pages_leased, load.pages_total) if load else (0, spec.pages)
    tokens = used * spec.page_tokens
    return {
        "dp_rank": replica.index,
        "state": replica.state,
        "num_running_reqs": running,
        "num_waiting_reqs": max(0, replica.inflight - running),
        "num_used_tokens": tokens,
        "num_total_tokens": tokens,
        "max_total_num_tokens": total * spec.page_tokens,
        "max_running_requests": spec.max_running,
        "token_usage": used / total if total else 0.0,
    }
