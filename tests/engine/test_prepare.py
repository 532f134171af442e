"""What is done in idle moments."""

from __future__ import annotations

import pytest

from backend.interface import DeviceLost
from config import QueueSettings
from engine.engine import Engine
from engine.opening import open_backend
from tests.engine.engine_bench import Scripted, fake_settings
from tests.engine.scheduler_bench import ask


def test_preparing_ends_when_nothing_is_left() -> None:
    engine = Engine(Scripted(open_backend(fake_settings()).spec, to_prepare=2), QueueSettings())
    assert [engine.prepare() for _ in range(4)] == [True, True, False, False]


def test_a_backend_that_fails_while_it_prepares_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted = Scripted(open_backend(fake_settings()).spec)
    engine = Engine(scripted, QueueSettings())

    def broken() -> bool:
        raise DeviceLost("capture failed")

    monkeypatch.setattr(scripted, "prepare", broken)
    assert not engine.prepare()
    assert "capture failed" in str(engine.failure)


def test_a_stream_that_is_open_while_preparing_fails_ends_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted = Scripted(open_backend(fake_settings()).spec)
    engine = Engine(scripted, QueueSettings())
    engine.submit(ask("a"))

    def broken() -> bool:
        raise DeviceLost("capture failed")

    monkeypatch.setattr(scripted, "prepare", broken)
    assert not engine.prepare()
    (delta,) = engine.step().deltas
    assert delta.finish is not None
    assert (delta.id, delta.finish.reason) == ("a", "error")
    assert engine.step().deltas == []
    assert engine.idle
