"""What operators read about the server: one object for each question, plain values, ready for JSON.

Each can be asked for at any time; only `model_info` needs a model.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from api.service import Service
from backend.interface import Load
from config import Settings
from engine.multi_device import EnginePool, ReplicaStatus
from engine.process_age import process_age
from engine.statistics import Distribution, Statistics
from engine.versions import versions

PACKAGES = (
    "mini-sglang",
    "torch",
    "transformers",
    "tokenizers",
    "fastapi",
    "uvicorn",
    "pyzmq",
    "msgspec",
)
MASK = "**********"  # as pydantic shows a secret
PAGES = ("total", "free", "cached", "leased")
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def metrics(service: Service) -> dict[str, object]:
    """Totals and rolling averages, and how much there is to do now."""
    pool = service.pool
    return {**pool.statistics.snapshot(), "running": pool.running, "waiting": pool.waiting}


def stats(service: Service) -> dict[str, Any]:
    """How busy the server is, replica by replica."""
    pool, seen = service.pool, service.pool.statistics
    loads = [replica.load for replica in pool.replicas if replica.load is not None]
    return {
        "scheduler_mode": service.settings.pool.mode,
        "state": pool.state,
        "uptime_s": round(process_age(), 1),
        "running": pool.running,
        "waiting": pool.waiting,
        "limits": asdict(pool.limits),
        "replicas": replicas(pool),
        "pages": {name: sum(getattr(load, f"pages_{name}") for load in loads) for name in PAGES},
        "cache": {
            "prompt_tokens": seen.prompt_tokens,
            "cached_tokens": seen.cached_tokens,
            "hit_rate": seen.cached_tokens / seen.prompt_tokens if seen.prompt_tokens else None,
        },
        "averages": seen.averages(),
        "totals": _totals(seen),
        "latency_ms": _latencies(seen),
    }


def _totals(seen: Statistics) -> dict[str, Any]:
    """What has been counted since the start."""
    return {
        "accepted": seen.requests_accepted,
        "rejected": seen.rejections.total(),
        "requests": dict(seen.requests),  # ended, by finish reason
        "prompt_tokens": seen.prompt_tokens,
        "cached_tokens": seen.cached_tokens,
        "generated_tokens": seen.generated_tokens,
    }


def _latencies(seen: Statistics) -> dict[str, dict[str, float | None]]:
    """Percentiles since the start, in milliseconds; None: there was nothing to measure."""
    measured = {
        "ttft": seen.time_to_first_token,
        "itl": seen.inter_token,
        "e2e": seen.end_to_end,
        "queue": seen.queue_time,
    }
    return {name: _percentiles(seconds) for name, seconds in measured.items()}


def _percentiles(seconds: Distribution) -> dict[str, float | None]:
    found = {name: seconds.quantile(share) for name, share in QUANTILES.items()}
    return {name: None if value is None else round(value * 1e3, 3) for name, value in found.items()}


def replicas(pool: EnginePool) -> list[dict[str, Any]]:
    """Each engine: its state, and its load by its last step."""
    now = time.monotonic()
    return [_replica(replica, now) for replica in pool.replicas]


def _replica(replica: ReplicaStatus, now: float) -> dict[str, Any]:
    load: Load | None = replica.load
    return {
        "index": replica.index,
        "device": replica.device,
        "state": replica.state,
        "pid": replica.pid,
        "restarts": replica.restarts,
        "inflight": replica.inflight,
        "silent_s": None if replica.last_news is None else round(now - replica.last_news, 3),
        "load": None if load is None else asdict(load),
    }


def model_info(service: Service) -> dict[str, Any]:
    """The model and the engines' limits: SGLang's names, then ours. Raises Unavailable."""
    model = service.model
    facts = asdict(model.spec)
    folder = facts.pop("folder")
    return {
        "model_path": folder or model.spec.model,
        "tokenizer_path": folder or model.spec.model,
        "is_generation": True,
        "preferred_sampling_params": asdict(model.defaults),
        "served_names": list(model.names),
        "has_chat_template": model.tokenizer.has_chat_template,
        "backend": facts.pop("name"),
        **facts,
    }


def server_info(service: Service) -> dict[str, Any]:
    """This process: versions, every flag's value (keys as asterisks), the engines. SGLang's clients
    read `page_size`: cached tokens are counted in whole pages.
    """
    return {
        "state": service.pool.state,
        "page_size": service.settings.backend.cache.page_tokens,
        "uptime_s": round(process_age(), 1),
        "versions": versions(PACKAGES),
        "settings": _settings(service.settings),
        "limits": asdict(service.pool.limits),
        "replicas": replicas(service.pool),
    }


def _settings(settings: Settings) -> dict[str, Any]:
    """Every flag in force; keys are masked, and so are prefixes: they hold system prompts."""
    found: dict[str, Any] = settings.model_dump(mode="json", by_alias=True)
    server = found["server"]
    server["WARM_PREFIXES"] = server["WARM_PREFIXES"] and MASK
    return found
