"""What is measured of SGLang on a CUDA device, over a double of it: both ways do the same work."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.interface import BackendFailed
from bench.cuda_check import sglang_beside
from bench.cuda_check.results import Results
from bench.cuda_check.sglang_beside import RUNS, beside_direct, direct, native
from bench.workloads import Job, Workload
from config import BackendSettings, Settings
from tests.backend.sglang.engine_double import stand_in
from tests.backend.sglang.opened import open_sglang, settings, write_folder
from tests.conformance.cases import prompt

WORKLOAD = Workload("reference", tuple(Job(prompt(n, 5 + n), 6 + n) for n in range(4)), 0.6)
RATES = (
    "sglang_output_tokens_per_s",
    "sglang_direct_output_tokens_per_s",
    "sglang_direct_streamed_output_tokens_per_s",
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_beside, "reference", lambda vocabulary: WORKLOAD)
    monkeypatch.setattr(sglang_beside, "about", lambda spec, ceiling: {"backend": spec.name})


def test_both_ways_are_measured_in_turns_and_the_share_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = stand_in(monkeypatch, step_s=0.001)
    given = Settings(backend=settings(write_folder(tmp_path / "model")))
    results = Results(tmp_path / "h200.json")
    order = []
    for found in beside_direct(given):
        results.add(found)
        order += [name for name in found if name in RATES]
    assert [len(results.fresh[name]) for name in RATES] == [RUNS] * 3
    assert order[:3] == order[3:6] != sorted(order)[:3]
    share = results.fresh["sglang_share_of_direct"]
    assert (
        0
        < share
        == pytest.approx(
            sorted(results.fresh[RATES[0]])[1] / sorted(results.fresh[RATES[1]])[1], abs=1e-3
        )
    )
    assert script.engines[0].shut


def test_an_answer_that_is_short_is_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    backend = open_sglang(settings(write_folder(tmp_path / "model")))
    try:
        for streamed in (False, True):
            assert direct(backend.bridge, WORKLOAD, streamed) > 0
        long = Workload("long", (Job((5, 6), 10), Job((7,) * 119, 8)))
        with pytest.raises(BackendFailed, match="of 18"):
            direct(backend.bridge, long, streamed=False)
    finally:
        backend.close()


def test_the_native_backend_is_measured_under_the_name_of_its_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.cuda_check.speed.reference", lambda vocabulary: WORKLOAD)
    first, second = native(Settings(backend=BackendSettings(impl="fake")))
    assert first == {"native_auto_attention": "none"}
    assert len(second["native_auto_output_tokens_per_s"]) == RUNS
