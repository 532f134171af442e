"""The verbs, over a pool that does what the test says."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from api.auth import fingerprint
from api.control import COMMANDS, MAX_DRAIN_WAIT_S, VERBS, Arguments, Control, Verb
from backend.interface import BackendFailed
from engine.dispatcher import Limits
from engine.log import OURS
from tests.api.doubles import SPEC, ScriptedPool, live, ready_service, replica, service_over
from tests.ipc.control_bench import free_endpoint, peer, serving


def run(pool: ScriptedPool, command: dict[str, Any]) -> dict[str, Any]:
    """The answer to a command, as it would go over a wire."""
    answer = asyncio.run(Control(ready_service(pool)).run(command))
    return dict(json.loads(json.dumps(answer, allow_nan=False)))


def test_metrics_are_the_statistics_and_what_there_is_to_do() -> None:
    pool = ScriptedPool(running=3, waiting=2)
    pool.statistics.rejected("queue_full")
    answer = run(pool, {"cmd": "metrics"})
    assert (answer["running"], answer["waiting"]) == (3, 2)
    assert answer["rejected_total"] == {"queue_full": 1}


def test_stats_are_those_of_the_route() -> None:
    answer = run(ScriptedPool(waiting=2), {"cmd": "stats"})
    assert (answer["state"], answer["waiting"], len(answer["replicas"])) == ("ready", 2, 1)


def test_health_says_whether_it_serves_and_why_not() -> None:
    answer = run(ScriptedPool(), {"cmd": "health"})
    assert (answer["status"], answer["ready"], answer["progress"]) == ("ready", True, True)
    answer = run(ScriptedPool(state="draining"), {"cmd": "health"})
    assert (answer["status"], answer["ready"], answer["progress"]) == ("draining", False, True)
    assert "draining" in answer["reason"]


def test_a_pause_says_what_it_ended_and_continue_what_there_is_to_do() -> None:
    pool = ScriptedPool(live=[live("a"), live("b")], waiting=1)
    answer = run(pool, {"cmd": "pause", "mode": "in_place"})
    assert (answer["ok"], answer["aborted"], pool.paused) == (True, 0, True)
    assert run(pool, {"cmd": "pause"})["aborted"] == 2
    assert run(pool, {"cmd": "pause"})["aborted"] == 0
    answer = run(pool, {"cmd": "continue"})
    assert (answer["ok"], answer["waiting"], pool.paused) == (True, 1, False)
    assert run(pool, {"cmd": "pause", "mode": "retract"})["error"] == "invalid_argument"


def test_warm_runs_steps_on_every_replica() -> None:
    pool = ScriptedPool(replicas=[replica(0), replica(1)])
    answer = run(pool, {"cmd": "warm", "tokens": 8})
    assert answer == {"ok": True, "warmed_tokens": 2 * 9, "replicas": 2}
    assert pool.asked == [("warm", [0], 8)]


def test_warm_caches_a_prefix_as_a_prompt_would_be_encoded() -> None:
    pool = ScriptedPool()
    assert run(pool, {"cmd": "warm", "prefix": "Hi"})["ok"] is True
    assert pool.asked == [("warm", [256, *b"Hi"], 0)]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, "tokens, prefix"),
        ({"tokens": 1, "prefix": "a"}, "tokens, prefix"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": -1}, "tokens"),
        ({"tokens": 1.5}, "tokens"),
        ({"tokens": "8"}, "tokens"),
        ({"tokens": True}, "tokens"),
        ({"tokens": float("nan")}, "tokens"),
        ({"tokens": SPEC.max_model_len}, "tokens"),
        ({"tokens": 10**30}, "tokens"),
        ({"prefix": ""}, "prefix"),
        ({"prefix": 5}, "prefix"),
        ({"prefix": "a" * SPEC.max_model_len}, "prefix"),
        ({"prefix": "\ud800"}, "prefix"),
        ({"tokens": 1, "replica": 0}, "replica"),
    ],
)
def test_what_cannot_be_warmed_is_refused_by_name(arguments: dict[str, Any], names: str) -> None:
    pool = ScriptedPool()
    answer = run(pool, {"cmd": "warm", **arguments})
    assert answer["error"] == "invalid_argument"
    assert names in answer["message"]
    assert "\n" not in answer["message"]
    assert pool.asked == []


def test_as_much_as_fits_can_be_warmed() -> None:
    assert run(ScriptedPool(), {"cmd": "warm", "tokens": SPEC.max_model_len - 1})["ok"] is True


@pytest.mark.parametrize("arguments", [{"tokens": 1}, {"prefix": "a"}])
def test_nothing_is_warmed_before_there_is_an_engine(arguments: dict[str, Any]) -> None:
    control = Control(service_over(ScriptedPool(state="starting")))
    answer = asyncio.run(control.run({"cmd": "warm", **arguments}))
    assert answer["error"] == "unavailable"


def test_drain_refuses_new_work_and_says_what_is_left() -> None:
    pool = ScriptedPool(running=2, waiting=1)
    answer = run(pool, {"cmd": "drain"})
    assert answer == {"ok": True, "status": "draining", "running": 2, "waiting": 1}
    assert pool.asked == [("drained", 0.0)]
    assert run(pool, {"cmd": "drain"}) == answer


def test_drain_waits_as_long_as_it_is_told() -> None:
    pool = ScriptedPool()
    assert run(pool, {"cmd": "drain", "wait": 2.5})["running"] == 0
    assert pool.asked == [("drained", 2.5)]
    assert VERBS["drain"].timeout > MAX_DRAIN_WAIT_S


@pytest.mark.parametrize("wait", [-1, MAX_DRAIN_WAIT_S + 1, float("nan"), "5", None, True])
def test_a_wait_that_is_none_drains_nothing(wait: Any) -> None:
    pool = ScriptedPool()
    answer = run(pool, {"cmd": "drain", "wait": wait})
    assert answer["error"] == "invalid_argument"
    assert "wait" in answer["message"]
    assert pool.state == "ready"


def test_resume_accepts_again_however_often() -> None:
    pool = ScriptedPool(state="draining")
    for _ in range(2):
        assert run(pool, {"cmd": "resume"})["status"] == "ready"


@pytest.mark.parametrize(
    ("arguments", "left"),
    [({"id": "a"}, ["b", "c"]), ({"key": "one"}, ["c"]), ({"all": True}, [])],
)
def test_abort_ends_those_that_are_meant_and_none_the_second_time(
    arguments: dict[str, Any], left: list[str]
) -> None:
    mine = fingerprint("one")
    pool = ScriptedPool(live=[live("a", mine), live("b", mine), live("c", fingerprint("two"))])
    assert run(pool, {"cmd": "abort", **arguments}) == {"ok": True, "aborted": 3 - len(left)}
    assert [each.id for each in pool.live] == left
    assert run(pool, {"cmd": "abort", **arguments}) == {"ok": True, "aborted": 0}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"id": "a", "all": True}, {"all": False}, {"all": 1}, {"id": ""}, {"key": ""}, {"id": 5}],
)
def test_an_abort_that_is_not_clear_ends_nobody(arguments: dict[str, Any]) -> None:
    pool = ScriptedPool(live=[live("a")])
    assert run(pool, {"cmd": "abort", **arguments})["error"] == "invalid_argument"
    assert len(pool.live) == 1


def test_flush_says_how_many_pages_are_free_now() -> None:
    assert run(ScriptedPool(), {"cmd": "flush"}) == {"ok": True, "pages": 5}


def test_set_changes_what_is_named_and_says_what_holds() -> None:
    pool = ScriptedPool(limits=Limits(1, 2, 3))
    answer = run(pool, {"cmd": "set", "max_queued": 0, "max_inflight_total": 9})
    assert answer == {
        "ok": True,
        "limits": {"max_inflight_total": 9, "max_inflight_per_engine": 2, "max_queued": 0},
    }
    assert pool.limits == Limits(9, 2, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_queued": -1},
        {"max_queued": 1.5},
        {"max_queued": "1"},
        {"max_queued": True},
        {"max_queued": 5, "max_inflight_total": -1},
        {"max_queued": 5, "max_rows": 1},
        {"max_queued": 1 << 40},
    ],
)
def test_set_changes_all_or_nothing(arguments: dict[str, Any]) -> None:
    pool = ScriptedPool(limits=Limits(1, 2, 3))
    assert run(pool, {"cmd": "set", **arguments})["error"] == "invalid_argument"
    assert pool.limits == Limits(1, 2, 3)


def test_log_level_is_that_of_our_loggers() -> None:
    before = {name: logging.getLogger(name).level for name in OURS}
    try:
        assert run(ScriptedPool(), {"cmd": "log_level", "level": "DEBUG"})["level"] == "DEBUG"
        assert {logging.getLogger(name).level for name in OURS} == {logging.DEBUG}
        for level in ("TRACE", "debug", 10, None):
            answer = run(ScriptedPool(), {"cmd": "log_level", "level": level})
            assert answer["error"] == "invalid_argument"
        assert {logging.getLogger(name).level for name in OURS} == {logging.DEBUG}
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("command", [{}, {"cmd": None}, {"cmd": "reboot"}, {"cmd": ["stats"]}])
def test_an_unknown_verb_is_told_which_there_are(command: dict[str, Any]) -> None:
    answer = run(ScriptedPool(), command)
    assert answer["error"] == "unknown_command"
    assert all(verb in answer["message"] for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_takes_an_argument_that_it_does_not_know(verb: str) -> None:
    answer = run(ScriptedPool(), {"cmd": verb, "surprise": 1})
    assert answer["error"] == "invalid_argument"


def test_a_verb_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "flush", Verb(Arguments, Control.flush, timeout=0.01))
    answer = run(ScriptedPool(hangs=True), {"cmd": "flush"})
    assert answer["error"] == "timeout"
    assert "flush" in answer["message"]


def test_the_socket_runs_the_verbs_and_a_bad_message_changes_nothing() -> None:
    pool, endpoint = ScriptedPool(running=1), free_endpoint()
    service = ready_service(pool)

    async def scene() -> None:
        async with serving(endpoint, Control(service).run), peer(endpoint) as client:
            for body, kind in (
                (b'{"cmd": "drain"', "invalid_json"),
                (b'{"cmd": "drain", "wait": -1}', "invalid_argument"),
                (b'{"cmd": "Drain"}', "unknown_command"),
            ):
                assert (await client.ask(body))["error"] == kind
            assert pool.asked == []
            assert (await client.ask(b'{"cmd": "drain"}'))["running"] == 1
            assert pool.asked == [("drained", 0.0)]

    asyncio.run(scene())


def test_an_engine_that_fails_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: ScriptedPool) -> int:
        raise BackendFailed("the engine died")

    monkeypatch.setattr(ScriptedPool, "flush", fail)
    answer = run(ScriptedPool(), {"cmd": "flush"})
    assert answer == {"error": "engine_failed", "message": "the engine died"}


def test_each_verb_is_described_with_its_arguments() -> None:
    for (name, verb), schema in zip(VERBS.items(), COMMANDS, strict=True):
        assert schema["properties"]["cmd"] == {"const": name}
        assert schema["properties"].keys() == {"cmd", *verb.arguments.model_fields}
        assert "cmd" in schema["required"]
