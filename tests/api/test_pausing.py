"""Pausing, going on, flushing and loads over HTTP, over a pool that does what a test says."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from api.auth import ApiKeyMiddleware, Keys
from api.loads import router as loads_router
from api.metrics import open_registry
from api.operations import router
from backend.interface import Load
from config import ServerSettings
from tests.api.doubles import SPEC, ScriptedPool, live, ready_service, replica
from tests.api.in_process import application, refusal as refusal_of

LOCAL, ELSEWHERE = ("127.0.0.1", 50000), ("192.0.2.7", 50000)
OPERATOR = {"Authorization": "Bearer admin-key"}


def client(pool: ScriptedPool, origin: tuple[str, int] = LOCAL, **flags: Any) -> TestClient:
    service = ready_service(pool, ServerSettings.model_validate(flags))
    app = application(service, router, loads_router)
    app.state.keys = Keys.of(service.settings.server)
    app.state.registry = open_registry(service.pool)
    app.add_middleware(ApiKeyMiddleware, keys=app.state.keys)
    return TestClient(app, client=origin, raise_server_exceptions=False)


def refusal(answer: Any) -> tuple[int, str | None]:
    """The status of an error and the field it names, of an answer of the test client."""
    return refusal_of(answer)


@pytest.mark.parametrize(("body", "left"), [(None, 0), ({}, 0), ({"mode": "in_place"}, 2)])
def test_a_pause_ends_what_runs_unless_it_is_in_place(body: Any, left: int) -> None:
    pool = ScriptedPool(live=[live("a"), live("b")])
    answer = client(pool).post("/pause_generation", json=body).json()
    assert (answer["status"], answer["aborted"]) == ("ok", 2 - left)
    assert (pool.paused, len(pool.live)) == (True, left)


def test_pausing_and_going_on_may_be_said_twice() -> None:
    pool = ScriptedPool()
    http = client(pool)
    for path, paused in (
        ("pause", True),
        ("pause", True),
        ("continue", False),
        ("continue", False),
    ):
        answer = http.post(f"/{path}_generation")
        assert (answer.status_code, answer.json()["status"]) == (200, "ok")
        assert pool.paused is paused


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("pause", {"mode": "retract"}, "mode"),
        ("pause", {"mode": "gently"}, "mode"),
        ("pause", {"mode": 1}, "mode"),
        ("continue", {"torch_empty_cache": "yes"}, "torch_empty_cache"),
        ("pause", [], None),
    ],
)
def test_a_wrong_body_is_a_400(path: str, body: Any, name: str | None) -> None:
    pool = ScriptedPool()
    assert refusal(client(pool).post(f"/{path}_generation", json=body)) == (400, name)
    assert not pool.paused


def test_an_unknown_field_is_a_warning_or_where_asked_for_a_400() -> None:
    http = client(ScriptedPool())
    answer = http.post("/pause_generation", json={"mood": 1})
    assert "mood" in answer.json()["warnings"][0]
    strict = http.post("/pause_generation", json={"mood": 1}, headers={"x-strict": "1"})
    assert refusal(strict) == (400, "mood")


@pytest.mark.parametrize("path", ["/pause_generation", "/continue_generation"])
def test_only_the_operator_pauses(path: str) -> None:
    assert client(ScriptedPool()).post(path).status_code == 200
    assert client(ScriptedPool(), ELSEWHERE).post(path).status_code == 403
    keyed = client(ScriptedPool(), ELSEWHERE, ADMIN_API_KEY="admin-key")
    assert keyed.post(path).status_code == 401
    assert keyed.post(path, headers=OPERATOR).status_code == 200


def test_a_pause_is_seen_and_is_not_taken_for_a_fault() -> None:
    silent = replica(inflight=2, last_news=-1000.0)
    pool = ScriptedPool(replicas=[silent])
    http = client(pool)
    assert http.get("/health/progress").status_code == 503
    pool.paused = True
    assert http.get("/health/progress").status_code == 200
    answer = http.get("/health_generate")
    assert (answer.status_code, "paused" in answer.text) == (503, True)


def test_the_cache_is_not_flushed_while_requests_run() -> None:
    pool = ScriptedPool(running=2, waiting=1)
    answer = client(pool).post("/flush_cache")
    assert answer.status_code == 400
    assert "2 requests run and 1 wait" in answer.text
    assert ("flush",) not in pool.asked


def test_flushing_may_wait_for_their_end() -> None:
    pool = ScriptedPool()
    assert client(pool).get("/flush_cache?timeout=2.5").json() == {"ok": True, "pages": 5}
    assert pool.asked == [("drained", 2.5), ("flush",)]
    for wrong in ("-1", "soon", "nan", "1e9"):
        answer = client(pool).get(f"/flush_cache?timeout={wrong}")
        assert refusal(answer) == (400, "timeout")


def test_flushing_takes_the_operators_key_where_there_is_one() -> None:
    assert client(ScriptedPool(), ELSEWHERE).post("/flush_cache").status_code == 200
    keyed = client(ScriptedPool(), ADMIN_API_KEY="admin-key")
    assert keyed.post("/flush_cache").status_code == 401
    assert keyed.post("/flush_cache", headers=OPERATOR).status_code == 200


LOADS = [replica(0, inflight=3, load=Load(2, 1, 32, 20, 4, 8, 0, 7)), replica(1, load=None)]


def test_loads_are_told_replica_by_replica() -> None:
    http = client(ScriptedPool(replicas=LOADS, waiting=4))
    answer = http.get("/v1/loads").json()
    assert answer["num_waiting_reqs"] == 4
    first, second = answer["loads"]
    page = SPEC.page_tokens
    assert first == {
        "dp_rank": 0,
        "state": "ready",
        "num_running_reqs": 2,
        "num_waiting_reqs": 1,
        "num_used_tokens": 8 * page,
        "num_total_tokens": 8 * page,
        "max_total_num_tokens": 32 * page,
        "max_running_requests": SPEC.max_running,
        "token_usage": 0.25,
    }
    assert (second["dp_rank"], second["num_running_reqs"], second["num_used_tokens"]) == (1, 0, 0)
    assert [each["dp_rank"] for each in http.get("/v1/loads?dp_rank=1").json()["loads"]] == [1]
    older = {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 1, "num_tokens": 8 * page}
    assert http.get("/get_load").json()[0] == older


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("dp_rank=2", "dp_rank"),
        ("dp_rank=-1", "dp_rank"),
        ("dp_rank=x", "dp_rank"),
        ("include=core,moods", "include"),
        ("format=prometheus", "format"),
    ],
)
def test_a_wrong_question_about_loads_is_a_400(query: str, name: str) -> None:
    http = client(ScriptedPool(replicas=LOADS))
    assert refusal(http.get(f"/v1/loads?{query}")) == (400, name)
    assert http.get("/v1/loads?include=core,queues&format=json").status_code == 200
