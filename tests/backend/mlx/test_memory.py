"""How many tokens there is room for, with a machine's memory made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from backend.interface import StartFailed
from backend.mlx import library
from backend.mlx.memory import page_budget
from config import BackendSettings, BatchSettings, CacheSettings, DeviceSettings

MIB = 1 << 20
TOKEN = 1 << 10  # bytes


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB are free on the CPU, 48 on the GPU."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * MIB))
    monkeypatch.setattr(library, "recommended_bytes", lambda: 80 * MIB)
    monkeypatch.setattr(library, "active_bytes", lambda: 32 * MIB)


def budget(device: str = "cpu", context: int = 1 << 20, **cache: Any) -> int:
    settings = BackendSettings(
        cache=CacheSettings(**cache),
        batch=BatchSettings(max_running=4),
        device=DeviceSettings(memory_fraction=0.5),
    )
    return page_budget(settings, TOKEN, context, device)


def test_without_a_budget_it_is_a_fraction_of_a_share_of_what_is_free() -> None:
    assert budget() == 64 * 1024 // 4 // 2
    assert budget("mps") == 48 * 1024 // 2 // 2


def test_it_is_no_more_than_every_row_can_fill() -> None:
    assert budget(context=100) == 400


def test_a_budget_is_kept_to() -> None:
    assert budget(budget_tokens=40_000) == 40_000
    assert budget(budget_tokens=3, page_tokens=16) == 16
    assert budget("mps", budget_tokens=48 * 1024) == 48 * 1024


def test_a_budget_beyond_what_is_free_is_refused_with_one_that_is_not() -> None:
    with pytest.raises(
        StartFailed, match=r"^PAGE_TOKEN_BUDGET=65537 takes 64 MiB, [^\n]*lower it to 65536,[^\n]*$"
    ):
        budget(budget_tokens=64 * 1024 + 1)


def test_where_no_page_fits_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 << 10))
    with pytest.raises(StartFailed, match=r"^[^\n]* hold no page of 16 tokens, [^\n]*$"):
        budget()


def test_states_of_fixed_size_are_not_measured_in_positions() -> None:
    settings = BackendSettings(batch=BatchSettings(max_running=4))
    assert page_budget(settings, 0, 1000, "cpu") == 4000
