"""How many engines there are, and where each runs."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from backend.interface import StartFailed
from config import DeviceSettings, PoolSettings
from engine import devices
from engine.devices import ReplicaPlan, count_cuda_devices, plan_replicas

VISIBLE, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VISIBLE, THREADS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "available_cores", lambda: 8)


def nobody_counts() -> int:
    raise AssertionError("the driver was asked for nothing")


def plan(
    replicas: str = "auto",
    device: str = "auto",
    impl: str = "hf",
    multi: bool = True,
    gpus: int | Callable[[], int] = nobody_counts,
) -> list[ReplicaPlan]:
    pool = PoolSettings.model_validate({"replicas": replicas, "multi_device": multi})
    count = gpus if callable(gpus) else lambda: gpus
    return plan_replicas(pool, DeviceSettings.model_validate({"device": device}), impl, count)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_auto_is_one_for_each_gpu_and_says_so(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plans = plan(device=device, gpus=3)
    assert [each.index for each in plans] == [0, 1, 2]
    assert [each.device for each in plans] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [each.environment for each in plans] == [{VISIBLE: str(i)} for i in range(3)]
    assert caplog.messages == ["REPLICAS=auto: 3, one for each GPU"]


@pytest.mark.parametrize(
    "given",
    [
        {"gpus": 0},
        {"gpus": 1},
        {"device": "cuda", "gpus": 0},  # which the backend refuses, by its own line
        {"device": "cpu"},
        {"device": "mps"},
        {"impl": "fake"},
        {"multi": False},
        {"replicas": "1"},
        {"replicas": "1", "device": "cuda"},
    ],
)
def test_a_single_engine_is_left_to_the_settings_as_they_are(given: dict[str, Any]) -> None:
    assert plan(**given) == [ReplicaPlan(0, given.get("device", "auto"), {})]


def test_a_number_takes_the_first_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [each.device for each in plan("2", gpus=4)] == ["cuda:0", "cuda:1"]
    monkeypatch.setenv(VISIBLE, "5, GPU-8d6f,2")
    assert [each.environment[VISIBLE] for each in plan("2", gpus=3)] == ["5", "GPU-8d6f"]
    assert [each.device for each in plan(gpus=3)] == ["cuda:5", "cuda:GPU-8d6f", "cuda:2"]


@pytest.mark.parametrize(("device", "gpus"), [("auto", 2), ("cuda", 2), ("cuda", 0), ("mps", 1)])
def test_more_than_there_are_is_refused_with_both_numbers(device: str, gpus: int) -> None:
    with pytest.raises(StartFailed, match=rf"^REPLICAS=3 [^\n]*DEVICE={device} are {gpus}: [^\n]*"):
        plan("3", device, gpus=gpus)


@pytest.mark.parametrize(
    "given", [{"device": "cpu"}, {"impl": "fake"}, {"impl": "fake", "device": "cuda"}, {"gpus": 0}]
)
def test_on_a_cpu_replicas_share_the_cores(given: dict[str, Any]) -> None:
    plans = plan("3", **given)
    assert [(each.index, each.device) for each in plans] == [(i, "cpu") for i in range(3)]
    assert {each.environment[THREADS] for each in plans} == {"2"}
    assert {each.environment["DEVICE"] for each in plans} == {"cpu"}
    assert {each.environment[THREADS] for each in plan("16", **given)} == {"1"}


def test_the_number_of_threads_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "7")
    assert {each.environment[THREADS] for each in plan("2", "cpu")} == {"7"}


# The probe


def test_where_nothing_is_visible_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")
    assert count_cuda_devices() == 0


@pytest.mark.parametrize(
    ("program", "count", "warned"),
    [("print(2, 0)", 2, False), ("print(0, 100)", 0, False), ("print(0, 803)", 0, True)],
)
def test_a_driver_that_does_not_start_is_warned_of(
    program: str,
    count: int,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(devices, "PROBE", program)
    assert count_cuda_devices() == count
    assert ("803" in caplog.text) == warned


@pytest.mark.parametrize("program", ["import os; os.abort()", "import time; time.sleep(60)"])
def test_a_driver_that_gives_no_answer_is_one_line(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "PROBE", program)
    monkeypatch.setattr(devices, "PROBE_TIMEOUT_S", 0.5)
    with pytest.raises(StartFailed, match=r"^the CUDA driver [^\n]*DEVICE=cpu$"):
        count_cuda_devices()


@pytest.mark.gpu
def test_the_probe_counts_what_the_driver_tool_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    devices_there = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    assert count_cuda_devices() == devices_there
    monkeypatch.setenv(VISIBLE, "0")
    assert count_cuda_devices() == 1
