"""What schemathesis does between two cases, read by it through SCHEMATHESIS_HOOKS.

A request that pauses, drains or limits the server would make each later one wait or be a 503.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import httpx

hook = importlib.import_module("schemathesis").hook
STATEFUL = ("/control", "/pause_generation")
UNDO: list[dict[str, object]] = [
    {"cmd": "resume"},
    {"cmd": "continue"},
    {"cmd": "set", "max_inflight_total": 0, "max_inflight_per_engine": 0, "max_queued": 0},
]
PATIENCE_S = 20


def map_body(_: Any, body: Any) -> Any:
    """A `model` that is served: with any other nothing but the 404 would be tried."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        return {**body, "model": os.environ["FUZZ_MODEL"]}
    return body


def after_call(_: Any, case: Any, response: Any) -> None:
    """Undo what the case did to the server."""
    if case.operation.path in STATEFUL and response.status_code == 200:
        for command in UNDO:
            url = f"{os.environ['FUZZ_SERVER']}/control"
            httpx.post(url, json=command, timeout=PATIENCE_S).raise_for_status()


hook(map_body)
hook(after_call)
