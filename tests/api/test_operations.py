"""The operator's routes over HTTP, over a pool that does what the test says."""

from __future__ import annotations

import time
from typing import Any

import pytest
from starlette.testclient import TestClient

import api.health
from api.auth import ApiKeyMiddleware, Keys, fingerprint
from api.health import PROGRESS_LIMIT_S
from api.metrics import open_registry
from api.operations import router
from api.service import Service
from backend.interface import Finish, Overloaded
from config import ServerSettings
from tests.api.doubles import LOAD, SPEC, ScriptedPool, live, ready_service, replica, service_over
from tests.api.in_process import application

STARTING = [replica(state="starting", load=None)]
LOCAL = ("127.0.0.1", 50000)


def serve(service: Service, client: tuple[str, int] = LOCAL) -> TestClient:
    """A client of a server with these routes."""
    app = application(service, router)
    keys = Keys.of(service.settings.server)
    app.state.keys = keys
    app.state.registry = open_registry(service.pool)
    app.add_middleware(ApiKeyMiddleware, keys=keys)
    return TestClient(app, client=client, raise_server_exceptions=False)


def ready(pool: ScriptedPool | None = None, **flags: Any) -> TestClient:
    return serve(ready_service(pool or ScriptedPool(), ServerSettings.model_validate(flags)))


def starting() -> TestClient:
    return serve(service_over(ScriptedPool(state="starting", replicas=STARTING)))


def refusal(answer: Any, status: int) -> str:
    """The message of an answer in our form of errors."""
    assert answer.status_code == status
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    return str(error["message"])


@pytest.mark.parametrize("state", ["starting", "ready", "draining", "down"])
def test_it_lives_whatever_its_engines_do(state: Any) -> None:
    answer = serve(service_over(ScriptedPool(state=state))).get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": state})


def test_it_is_ready_when_an_engine_and_the_tokenizer_are_there() -> None:
    assert ready().get("/health/ready").json() == {"status": "ready"}
    message = refusal(serve(service_over(ScriptedPool())).get("/health/ready"), 503)
    assert "starting" in message


@pytest.mark.parametrize("state", ["starting", "draining", "down"])
def test_it_is_not_ready_in_any_other_state(state: Any) -> None:
    answer = ready(ScriptedPool(state=state)).get("/health/ready")
    assert refusal(answer, 503)
    assert answer.headers["retry-after"]


def test_it_is_not_ready_while_every_engine_is_restarted() -> None:
    pool = ScriptedPool(replicas=[replica(state="restarting"), replica(1, state="down")])
    assert "restarted" in refusal(ready(pool).get("/health/ready"), 503)
    pool.replicas = [replica(state="restarting"), replica(1)]
    assert ready(pool).get("/health/ready").status_code == 200


def test_it_makes_progress_while_work_goes_on_or_there_is_none() -> None:
    now = time.monotonic()
    silent = now - PROGRESS_LIMIT_S - 1
    for pool in (
        ScriptedPool(replicas=[replica(inflight=3, last_news=now)]),
        ScriptedPool(replicas=[replica(inflight=0, last_news=silent)]),
        ScriptedPool(replicas=[replica(inflight=1, last_news=None, load=None)]),
        ScriptedPool(replicas=STARTING, state="starting"),
        ScriptedPool(replicas=[replica(state="restarting"), replica(1)], waiting=3),
        ScriptedPool(state="draining"),
    ):
        assert ready(pool).get("/health/progress").status_code == 200


def test_it_makes_none_when_an_engine_is_silent_over_its_work() -> None:
    silent = time.monotonic() - PROGRESS_LIMIT_S - 1
    pool = ScriptedPool(replicas=[replica(0), replica(1, inflight=2, last_news=silent)])
    assert "engine 1 has 2 requests" in refusal(ready(pool).get("/health/progress"), 503)


def test_it_makes_none_when_requests_wait_for_engines_that_are_gone() -> None:
    now = time.monotonic()
    gone = [replica(state="restarting", last_news=now - PROGRESS_LIMIT_S - 1)]
    pool = ScriptedPool(replicas=gone, waiting=4)
    assert "4 requests wait" in refusal(ready(pool).get("/health/progress"), 503)
    back_soon = [replica(state="restarting", last_news=now)]
    pool = ScriptedPool(replicas=back_soon, waiting=4)
    assert ready(pool).get("/health/progress").status_code == 200
    assert refusal(ready(ScriptedPool(state="down")).get("/health/progress"), 503)


def test_a_token_is_really_generated() -> None:
    pool = ScriptedPool()
    assert ready(pool).get("/health_generate").status_code == 200
    assert pool.live == []


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": Finish("error", message="the engine died")},
        {"answer": Finish("abort")},
        {"answer": None},
        {"refusal": Overloaded("8 requests wait", 8, 1.0, 1.0)},
        {"state": "draining"},
    ],
)
def test_no_token_is_a_503(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.health, "GENERATE_LIMIT_S", 0.01)
    pool = ScriptedPool(**changes)
    assert refusal(ready(pool).get("/health_generate"), 503)
    assert pool.live == []


def test_no_token_is_generated_before_there_is_a_model() -> None:
    assert refusal(starting().get("/health_generate"), 503)


def test_metrics_are_prometheus_text() -> None:
    answer = ready(ScriptedPool(waiting=3)).get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers.get_list("content-type") == [answer.headers["content-type"]]
    assert "minisgl_requests_waiting 3.0" in answer.text


def test_stats_count_the_pages_of_every_engine() -> None:
    pool = ScriptedPool(
        replicas=[replica(0, inflight=2), replica(1, inflight=1), replica(2, "starting", load=None)]
    )
    pool.statistics.prompt_tokens, pool.statistics.cached_tokens = 40, 10
    answer = ready(pool).get("/stats").json()
    assert answer["scheduler_mode"] == "rr"
    assert [each["inflight"] for each in answer["replicas"]] == [2, 1, 0]
    assert [each["load"] is None for each in answer["replicas"]] == [False, False, True]
    assert answer["pages"] == {
        "total": 2 * LOAD.pages_total,
        "free": 2 * LOAD.pages_free,
        "cached": 2 * LOAD.pages_cached,
        "leased": 2 * LOAD.pages_leased,
    }
    assert answer["cache"] == {"prompt_tokens": 40, "cached_tokens": 10, "hit_rate": 0.25}
    assert "ttft_ms" in answer["averages"]


def test_stats_have_percentiles_and_totals_since_the_start() -> None:
    pool = ScriptedPool()
    before = ready(pool).get("/stats").json()
    nothing = {"p50": None, "p90": None, "p99": None}
    assert before["latency_ms"] == dict.fromkeys(("ttft", "itl", "e2e", "queue"), nothing)
    seen = pool.statistics
    seen.requests["stop"], seen.requests_accepted, seen.generated_tokens = 2, 3, 40
    seen.rejected("queue_full")
    seen.time_to_first_token.add(0.1, 100)
    stats = ready(pool).get("/stats").json()
    assert stats["totals"]["requests"] == {"stop": 2, "length": 0, "abort": 0, "error": 0}
    assert [stats["totals"][name] for name in ("accepted", "rejected")] == [3, 1]
    assert stats["totals"]["generated_tokens"] == 40
    first = stats["latency_ms"]["ttft"]
    assert 70 <= first["p50"] <= first["p90"] <= first["p99"] <= 100
    assert stats["uptime_s"] >= 0


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info_has_the_names_that_clients_know_and_ours(path: str) -> None:
    answer = ready(MODEL_ALIAS="small").get(path).json()
    assert answer["model_path"] == answer["tokenizer_path"] == SPEC.model
    assert answer["is_generation"] is True
    assert answer["served_names"] == ["small", SPEC.model]
    for name in ("max_model_len", "vocabulary", "dtype", "device", "attention", "pages"):
        assert answer[name] == getattr(SPEC, name)


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_tells_no_secret(path: str) -> None:
    client = ready(API_KEY="s3cret", ADMIN_API_KEY="s3cret too")
    answer = client.get(path, headers={"X-API-Key": "s3cret"})
    assert answer.status_code == 200
    assert "s3cret" not in answer.text
    info = answer.json()
    assert info["settings"]["pool"]["SCHEDULER_MODE"] == "rr"
    assert info["versions"]["fastapi"]
    assert info["uptime_s"] >= 0
    assert len(info["replicas"]) == 1


def test_server_info_says_in_how_many_tokens_the_cache_counts() -> None:
    info = ready().get("/server_info").json()
    assert info["page_size"] == info["settings"]["backend"]["cache"]["PAGE_SIZE_TOKENS"]


@pytest.mark.parametrize("path", ["/health", "/stats", "/metrics", "/server_info"])
def test_numbers_are_there_while_the_engines_start(path: str) -> None:
    assert starting().get(path).status_code == 200


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info", "/health/ready"])
def test_what_needs_a_model_is_a_503_until_then(path: str) -> None:
    answer = starting().get(path)
    assert "starting" in refusal(answer, 503)
    assert answer.headers["retry-after"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_cache_is_flushed(method: str) -> None:
    pool = ScriptedPool()
    assert ready(pool).request(method, "/flush_cache").json() == {"ok": True, "pages": 5}
    assert pool.asked == [("drained", 0.0), ("flush",)]


def test_requests_are_aborted_by_id_and_all() -> None:
    pool = ScriptedPool(live=[live("a"), live("b"), live("c")])
    client = ready(pool)
    assert client.post("/abort_request", json={"rid": "a"}).json() == {"ok": True, "aborted": 1}
    assert client.post("/abort_request", json={"rid": "a"}).json() == {"ok": True, "aborted": 0}
    body = {"rid": "", "abort_all": True}
    assert client.post("/abort_request", json=body).json() == {"ok": True, "aborted": 2}


def test_nobody_aborts_the_requests_of_another_key() -> None:
    one, two = fingerprint("one"), fingerprint("two")
    pool = ScriptedPool(live=[live("a", one), live("b", two)])
    client = ready(pool, API_KEY="one,two")
    for body in ({"rid": "b"}, {"abort_all": True}):
        client.post("/abort_request", json=body, headers={"X-API-Key": "one"})
    assert [each.id for each in pool.live] == ["b"]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff", "JSON"),
        (b"[]", "object"),
        (b"{}", "rid"),
        (b'{"rid": 5}', "rid"),
        (b'{"abort_all": 1}', "abort_all"),
        (b'{"rid": "a", "abort_all": true}', "rid"),
    ],
)
def test_an_abort_that_is_not_clear_is_a_400(body: bytes, names: str) -> None:
    pool = ScriptedPool(live=[live("a")])
    assert names in refusal(ready(pool).post("/abort_request", content=body), 400)
    assert len(pool.live) == 1


def test_an_unknown_field_of_abort_is_told_or_refused() -> None:
    body = {"rid": "a", "reason": "tired"}
    assert "reason" in ready().post("/abort_request", json=body).json()["warnings"][0]
    assert "reason" in refusal(ready(STRICT_FIELDS=True).post("/abort_request", json=body), 400)


def test_a_verb_runs_over_http() -> None:
    pool = ScriptedPool(running=2)
    answer = ready(pool).post("/control", json={"cmd": "drain"})
    assert answer.json() == {"ok": True, "status": "draining", "running": 2, "waiting": 0}


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        (b"", 400, "JSON"),
        (b"[]", 400, "object"),
        (b"{}", 400, "cmd"),
        (b'{"cmd": "reboot"}', 400, "cmd"),
        (b'{"cmd": ' + b"[" * 10_000, 400, "JSON"),
        (b'{"cmd": "warm", "tokens": -1}', 400, "tokens"),
        (b'{"cmd": "drain", "wait": NaN}', 400, "wait"),
        (b'{"cmd": "set", "max_queued": 1' + b"0" * 400 + b"}", 400, "max_queued"),
    ],
)
def test_a_bad_command_over_http_is_an_error_of_ours(body: bytes, status: int, names: str) -> None:
    assert names in refusal(ready().post("/control", content=body), status)


def test_a_verb_that_needs_a_model_is_a_503_over_http() -> None:
    assert refusal(starting().post("/control", json={"cmd": "warm", "tokens": 1}), 503)


def test_control_is_for_the_operator_and_looks_at_nothing_before() -> None:
    pool = ScriptedPool()
    elsewhere = serve(ready_service(pool), ("203.0.113.9", 50000))
    for body in (b'{"cmd": "drain"}', b"{"):
        assert refusal(elsewhere.post("/control", content=body), 403)
    assert pool.asked == []
    with_key = ready(pool, ADMIN_API_KEY="root")
    assert refusal(with_key.post("/control", json={"cmd": "drain"}), 401)
    headers = {"Authorization": "Bearer root"}
    assert with_key.post("/control", json={"cmd": "drain"}, headers=headers).status_code == 200
    assert pool.asked == [("drained", 0.0)]
