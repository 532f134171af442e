"""The operator's routes: probes, numbers, facts, and the control verbs over HTTP.

They answer from the first moment on; what needs a model is a 503 until there is one.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from api import health, reports
from api.auth import Keys, require_admin
from api.bodies import (
    Body,
    Form,
    decode,
    described,
    parse,
    read_body,
    request_body,
    unknown_fields,
)
from api.control import COMMANDS, MAX_DRAIN_WAIT_S, Answer, Control
from api.errors import refused
from api.metrics import render
from api.replies import warnings_entry
from api.service import is_strict, owner_of, service_of
from backend.interface import Unavailable

router = APIRouter(tags=["operations"])


@router.get("/health")
async def live(request: Request) -> dict[str, Any]:
    """200 as long as the process lives, whatever its engines do."""
    return {"status": service_of(request).pool.state}


@router.get("/health/ready")
async def ready(request: Request) -> dict[str, Any]:
    """200 when requests are served; 503 with the reason while starting, draining or down."""
    return _passed(request, health.why_not_ready(service_of(request)))


@router.get("/health/progress")
async def progress(request: Request) -> dict[str, Any]:
    """503 with the reason when work is stuck and a restart would help."""
    return _passed(request, health.why_stuck(service_of(request).pool, time.monotonic()))


@router.get("/health_generate")
async def generates(request: Request) -> dict[str, Any]:
    """200 when a token was really generated just now, else 503."""
    await health.generate_one_token(service_of(request))
    return _passed(request, None)


def _passed(request: Request, reason: str | None) -> dict[str, Any]:
    if reason is not None:
        raise Unavailable(reason)
    return {"status": service_of(request).pool.state}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    body, content_type = render(request.app.state.registry, request.headers.get("accept"))
    return Response(body, headers={"Content-Type": content_type})


@router.get("/stats")
async def stats(request: Request) -> dict[str, Any]:
    """Scheduler mode, engines, queue, pages, cache hits and rolling averages."""
    return reports.stats(service_of(request))


@router.get("/model_info")
@router.get("/get_model_info")
async def model_info(request: Request) -> dict[str, Any]:
    """The model, its names, and the limits of the engines."""
    return reports.model_info(service_of(request))


@router.get("/server_info")
@router.get("/get_server_info")
async def server_info(request: Request) -> dict[str, Any]:
    """Versions, settings without secrets, engines, uptime."""
    return reports.server_info(service_of(request))


@router.get("/flush_cache")
@router.post("/flush_cache")
async def flush_cache(
    request: Request, timeout: Annotated[float, Query(ge=0, le=MAX_DRAIN_WAIT_S)] = 0.0
) -> dict[str, Any]:
    """Give up every cached prefix, on every engine. 400 while requests run or wait; `timeout`:
    seconds to wait for their end.
    """
    _require_the_operators_key(request)
    service = service_of(request)
    pool = service.pool
    if not await pool.drained(timeout):
        raise refused(
            f"{pool.running} requests run and {pool.waiting} wait: flush the cache when there are "
            "none, or with timeout=SECONDS"
        )
    return await Control(service).call({"cmd": "flush"})


def _require_the_operators_key(request: Request) -> None:
    """Of who asks, where there is such a key. Raises ApiError 401."""
    keys: Keys = request.app.state.keys
    if keys.admin is not None:
        require_admin(request)


class PauseRequest(Form):
    """SGLang's body of `/pause_generation`."""

    mode: Literal["abort", "retract", "in_place"] | None = None


class ContinueRequest(Form):
    """SGLang's body of `/continue_generation`."""

    torch_empty_cache: bool | None = Field(None, description="changes nothing: none is kept")


@router.post("/pause_generation", openapi_extra=described(PauseRequest, required=False))
async def pause_generation(request: Request) -> dict[str, Any]:
    """Generate nothing until `/continue_generation`; new requests wait. For the operator.

    What goes on ends (`abort`, the default), or stays where it is (`in_place`).
    """
    require_admin(request)
    body = await _optional(request, PauseRequest)
    warnings = unknown_fields(body.model_extra, is_strict(request))
    mode = body.mode or "abort"
    if mode == "retract":
        raise refused("mode retract is not supported: take abort or in_place", "mode")
    answer = await Control(service_of(request)).call({"cmd": "pause", "mode": mode})
    message = "Generation paused successfully."
    return {"status": "ok", "message": message, **_counts(answer), **warnings_entry(warnings)}


@router.post("/continue_generation", openapi_extra=described(ContinueRequest, required=False))
async def continue_generation(request: Request) -> dict[str, Any]:
    """Generate again, from where it was. For the operator."""
    require_admin(request)
    body = await _optional(request, ContinueRequest)
    warnings = unknown_fields(body.model_extra, is_strict(request))
    answer = await Control(service_of(request)).call({"cmd": "continue"})
    message = "Generation continued successfully."
    return {"status": "ok", "message": message, **_counts(answer), **warnings_entry(warnings)}


async def _optional(request: Request, form: type[Body]) -> Body:
    """The body as a `form`; no body says nothing. Raises ApiError."""
    return parse(await read_body(request) or b"{}", form)


def _counts(answer: Answer) -> Answer:
    return {name: answer[name] for name in ("aborted", "running", "waiting") if name in answer}


class AbortRequest(Form):
    """SGLang's body of `/abort_request`."""

    rid: str | None = None
    abort_all: bool = False


@router.post("/abort_request", openapi_extra=described(AbortRequest))
async def abort_request(request: Request) -> dict[str, Any]:
    """End requests of the caller's own key with finish "abort": one by its id, or all."""
    service = service_of(request)
    body = parse(await read_body(request), AbortRequest)
    warnings = unknown_fields(body.model_extra, is_strict(request))
    if body.abort_all == bool(body.rid):
        raise refused("either rid or abort_all is wanted", "rid")
    aborted = service.pool.abort(request_id=body.rid or None, owner=owner_of(request))
    return {"ok": True, "aborted": aborted, **warnings_entry(warnings)}


@router.post("/control", openapi_extra=request_body(COMMANDS))
async def control(request: Request) -> dict[str, Any]:
    """Run a verb of the control plane. For the operator."""
    require_admin(request)
    return await Control(service_of(request)).call(decode(await read_body(request)))
