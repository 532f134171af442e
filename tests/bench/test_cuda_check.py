"""What the check of a CUDA device does without one: it judges, gathers, counts and drives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from backend.interface import BackendFailed, RequestRefused
from bench.cuda_check import __main__ as script
from bench.cuda_check.children import run_child
from bench.cuda_check.goals import GOALS, Goal, verdicts
from bench.cuda_check.gpu_tests import count, gpu_files
from bench.cuda_check.kernels import PROFILED, SHOWN, SKIPPED, ProfiledSteps, tabulate
from bench.cuda_check.over_http import has_tokenizer
from bench.cuda_check.parts import FLAGS, PART_S, PARTS, Measurement
from bench.cuda_check.results import Results
from bench.cuda_check.speed import LONG_TURNS, TURNS, alone, long_prompt
from bench.cuda_check.steps import beside_floor
from bench.decode_step import rows
from bench.drive import Driver
from bench.roofline import Ceiling, StepWork
from bench.workloads import shared_prefixes
from config import (
    BackendSettings,
    BatchSettings,
    FakeSettings,
    ModelSettings,
    QueueSettings,
    Settings,
)
from engine.devices import count_cuda_devices
from engine.engine import Engine
from engine.llm import LLM
from engine.opening import open_backend

MEASURED = "tests.bench.measured"


@pytest.fixture
def engine() -> Iterator[Engine]:
    batch = BatchSettings(max_running=64, max_step_tokens=16384)
    engine = Engine(open_backend(BackendSettings(impl="fake", batch=batch)), QueueSettings())
    yield engine
    engine.close()


def word(measured: Any, must: float, aim: float, more: bool) -> str:
    goal = Goal("key", "what", must, aim, ".1f", more)
    (verdict,) = verdicts({"key": measured}, [goal])
    return verdict.word()


def test_a_goal_is_met_at_its_bound_and_of_several_runs_the_median_counts() -> None:
    assert [word(value, 26, 30, more=True) for value in (25.9, 26, 29.9, 30)] == [
        "MISSED",
        "must",
        "must",
        "aim",
    ]
    assert [word(value, 1.1, 0.6, more=False) for value in (1.2, 1.1, 0.6)] == [
        "MISSED",
        "must",
        "aim",
    ]
    assert word([20.0, 27.0, 31.0], 26, 30, more=True) == "must"
    assert list(verdicts({"another": 1})) == []


def test_the_goals_are_those_that_were_set() -> None:
    assert {goal.key: (goal.must, goal.aim) for goal in GOALS} == {
        "failed_tests": (0, 0),
        "reference_output_tokens_per_s": (26_000, 30_000),
        "batch1_ms_per_token": (1.1, 0.6),
        "ttft_4096_ms": (13, 10),
        "start_to_first_token_s": (12, 7),
        "http_share_of_offline": (0.85, 0.95),
        "sglang_share_of_direct": (0.95, 0.98),
        "memory_forecast_error": (0.03, 0.03),
    }
    assert all((goal.aim >= goal.must) is goal.more or goal.aim == goal.must for goal in GOALS)


def test_results_are_kept_as_they_come_and_those_of_other_calls_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "h200.json"
    first = Results(path)
    first.add({"commit": "a", "ttft_4096_ms": 20.0, "runs": [1.0]})
    second = Results(path)
    second.add({"commit": "b", "batch1_ms_per_token": 1.0})
    second.add({"runs": [5.0]})
    second.conclude("speed", {"commit": "b", "failures": []})
    found = json.loads(path.read_text())
    assert found["commit"] == "b"
    assert found["ttft_4096_ms"] == 20.0
    assert found["runs"] == [5.0]
    assert found["parts"] == {"speed": {"commit": "b", "failures": []}}
    assert found["goals"]["ttft_4096_ms"]["must_met"] is False
    assert found["goals"]["batch1_ms_per_token"]["must_met"] is True
    assert "ttft_4096_ms" not in second.fresh
    assert [each.name for each in path.parent.iterdir()] == ["h200.json"]


def test_runs_of_a_repeated_measurement_are_joined_and_shares_follow(tmp_path: Path) -> None:
    results = Results(tmp_path / "h200.json")
    results.add({"starts_to_first_token_s": [30.0]})
    assert "start_to_first_token_s" not in results.fresh
    results.add({"starts_to_first_token_s": [8.0]})
    assert results.fresh["first_start_to_first_token_s"] == 30.0
    assert results.fresh["start_to_first_token_s"] == 8.0
    results.add({"http_offline_output_tokens_per_s": [100.0, 90.0]})
    results.add({"http_output_tokens_per_s": [80.0, 70.0]})
    results.add({"http_offline_output_tokens_per_s": [100.0, 110.0]})
    told = results.add({"http_output_tokens_per_s": [90.0, 95.0]})
    assert told["http_share_of_offline"] == 0.85  # 85 of 100
    results.add({"memory_forecast_errors": [0.01]})
    assert results.add({"memory_forecast_errors": [0.005]})["memory_forecast_error"] == 0.01


@pytest.mark.parametrize("content", ["[1]", "no JSON"])
def test_a_file_of_another_kind_is_not_overwritten(content: str, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(RequestRefused, match="holds no JSON object"):
        Results(path)
    assert path.read_text() == content


def test_what_is_told_has_the_bounds_of_goals_and_no_long_lists() -> None:
    lines = script.told({"batch1_ms_per_token": 1.25, "device": "one", "runs": [1, 2]})
    assert lines == "batch 1, ms a token: 1.250 (must 1.100, aim 0.600): MISSED\ndevice: one\n"


def test_every_flag_that_is_set_is_a_switch(flags: dict[str, object]) -> None:
    measurements = [each for part in PARTS.values() for each in part]
    assert {flag for each in measurements for flag in each.flags} | set(FLAGS) <= set(flags)


def test_every_part_ends_in_time_and_every_measurement_is_there() -> None:
    for part in PARTS.values():
        assert sum(each.limit_s for each in part) < PART_S
        for each in part:
            module, function = each.run.split(":")
            assert callable(getattr(import_module(module), function))


def run(function: str, limit_s: float = 60, **flags: str) -> tuple[Any, list[str], str | None]:
    heard: list[Any] = []
    shown: list[str] = []
    measurement = Measurement("this", f"{MEASURED}:{function}", limit_s)
    failure = run_child(measurement, flags, heard.append, shown.append)
    return heard, shown, failure


def test_a_child_tells_its_results_and_the_rest_is_shown() -> None:
    heard, shown, failure = run("two_results", MAX_RUNNING="77")
    assert heard == [{"rows": 77}, {"batch1_ms_per_token": 1.0, "runs": [1.0, 2.0]}]
    assert shown == ["a line for the reader\n"]
    assert failure is None


def test_a_child_that_breaks_says_why_and_has_told_what_it_had() -> None:
    heard, shown, failure = run("breaks", MODEL_LOCAL_DIR="here")
    assert heard == [{"before": "here"}]
    assert shown == ["it broke\n"]
    assert failure == "this: ended with code 1"


def test_a_child_that_hangs_is_ended_and_has_told_what_it_had() -> None:
    heard, _, failure = run("hangs", limit_s=4)
    assert heard == [{"before": 1}]
    assert failure == "this: no end within 4 s"


@pytest.mark.parametrize(("functions", "code"), [(["two_results"], 0), (["breaks"], 1)])
def test_a_part_gathers_judges_and_says_how_it_went(
    functions: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part = tuple(Measurement(each, f"{MEASURED}:{each}", 60) for each in functions)
    monkeypatch.setitem(PARTS, "speed", part)
    monkeypatch.setattr(script, "count_cuda_devices", lambda: 1)
    out, log = tmp_path / "h200.json", tmp_path / "log"
    arguments = ["--part", "speed", "--out", out, "--log", log, "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["cuda_check", *map(str, arguments)])
    assert script.main() == code
    found = json.loads(out.read_text())
    assert found["commit"] == found["parts"]["speed"]["commit"] == "abc"
    assert len(found["parts"]["speed"]["failures"]) == code
    assert found.get("rows") == (None if code else 256)
    assert log.read_text() in capsys.readouterr().out


def test_a_missed_goal_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = (Measurement("two", f"{MEASURED}:two_results", 60),)
    monkeypatch.setitem(PARTS, "wide", part)
    monkeypatch.setattr(script, "count_cuda_devices", lambda: 1)
    monkeypatch.setattr(script, "verdicts", lambda values: verdicts(values, [STRICT]))
    arguments = ["--part", "wide", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["cuda_check", *arguments])
    assert script.main() == 1


STRICT = Goal("batch1_ms_per_token", "batch 1", 0.5, 0.4, ".1f")


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_without_a_device_it_says_so_in_one_line(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "h200.json"
    command = ["-m", "bench.cuda_check", "--part", "speed", "--out", str(out)]
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout + done.stderr == (
        "bench.cuda_check needs a CUDA device, and this machine has none\n"
    )
    assert not out.exists()


def test_kernels_are_those_of_one_step_the_longest_first() -> None:
    steps = [("short", 1.0), ("long", 6.0), ("short", 2.0), ("long", 6.0)]
    long, short = tabulate(steps, steps=2)
    assert (long.name, long.calls, long.us, long.share) == ("long", 1.0, 6.0, 0.8)
    assert (short.name, short.calls, short.us, short.share) == ("short", 1.0, 1.5, 0.2)
    many = [(f"kernel {number}", 100.0 - number) for number in range(SHOWN + 10)]
    table = tabulate(many, steps=1)
    assert len(table) == SHOWN + 1
    assert table[-1].name == "10 others"
    assert sum(kernel.us for kernel in table) == sum(time for _, time in many)


def test_quiet_steps_are_profiled_after_some_that_are_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    step = engine.step

    def watched(wait: float = 0.0) -> Any:
        output = step(wait)
        seen.append("quiet" if output.step_tokens == len(output.deltas) == 4 else "other")
        return output

    def begin(profiled: ProfiledSteps) -> None:
        profiled._profiler = seen
        seen.append("begin")

    monkeypatch.setattr(engine, "step", watched)
    monkeypatch.setattr(ProfiledSteps, "_begin", begin)
    monkeypatch.setattr(ProfiledSteps, "_end", lambda _: seen.append("end"))
    profiled = ProfiledSteps(engine, 4)
    Driver(profiled, rows(4, engine.spec, seed=0), 4, "run").run()
    begun, ended = seen.index("begin"), seen.index("end")
    assert seen[:begun].count("quiet") == SKIPPED
    assert seen[begun + 1 : ended] == ["quiet"] * PROFILED


def test_a_step_stands_beside_its_bytes_and_its_products() -> None:
    spec = replace(
        Engine(open_backend(BackendSettings(impl="fake")), QueueSettings()).spec,
        parameters=1000,
        weight_bytes=2000,
        kv_bytes_per_token=10,
    )
    works = [StepWork(4, 4, 400, seconds=9.0, interval=interval) for interval in (7.0, 8.0, 9.0)]
    step = beside_floor(4, works, spec, Ceiling(read_bytes_per_s=2000.0, flops_per_s=8000.0))
    assert (step.batch, step.steps, step.context) == (4, 3, 100)
    assert step.bytes_ms == 3000  # one second of weights, two of keys and values
    assert step.products_ms == 1000
    assert (step.floor_ms, step.share) == (4000, 0.5)
    with pytest.raises(BackendFailed, match="no step of 4 rows"):
        beside_floor(4, [], spec, Ceiling(1.0, 1.0))


def test_one_request_is_timed_alone_and_no_cache_answers_it() -> None:
    step_ms, tokens_ms = 2.0, 0.01  # of a step, and more for each of its tokens
    fake = FakeSettings(step_ms=step_ms, token_us=1000 * tokens_ms)
    batch = BatchSettings(max_running=4, max_step_tokens=16384)
    with LLM(Settings(backend=BackendSettings(impl="fake", fake=fake, batch=batch))) as llm:
        single = alone(llm)
        long = long_prompt(llm)
    assert len(single["batch1_runs"]) == TURNS
    assert single["batch1_ms_between_tokens"] > step_ms
    assert single["batch1_ms_per_token"] > step_ms
    assert len(long["ttft_4096_runs"]) == LONG_TURNS
    assert min(long["ttft_4096_runs"]) > step_ms + 4096 * tokens_ms
    assert min(long["ttft_4096_runs"]) <= long["ttft_4096_ms"] <= max(long["ttft_4096_runs"])


def test_groups_share_their_prefix_and_take_turns() -> None:
    workload = shared_prefixes(3, 4, shared=20, own=5, new_tokens=7, vocabulary=1000)
    assert [len(job.prompt) for job in workload.jobs] == [25] * 12
    prefixes = [job.prompt[:20] for job in workload.jobs]
    assert prefixes == prefixes[:3] * 4
    assert len(set(prefixes)) == 3
    assert len({job.prompt for job in workload.jobs}) == 12
    assert {job.new_tokens for job in workload.jobs} == {7}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ("120 passed, 400 deselected in 93.21s (0:01:33)\n", {"passed": 120, "deselected": 400}),
        (
            "== 2 failed, 5 passed, 1 skipped, 3 errors in 1.00s ==\n",
            {"failed": 2, "passed": 5, "skipped": 1, "error": 3},
        ),
        ("Killed\n", {}),
    ],
)
def test_outcomes_are_counted_as_pytest_says_them(last: str, expected: dict[str, int]) -> None:
    assert count(["7 passed in the first half\n", ".....\n", last]) == expected


def test_the_files_with_gpu_tests_are_found(root: Path) -> None:
    found = {path.relative_to(root).as_posix() for path in gpu_files(root / "tests")}
    assert "tests/backend/hf/kernels/test_paged_attention.py" in found
    assert "tests/test_config.py" not in found


def test_a_tokenizer_is_seen_in_the_folder(tmp_path: Path) -> None:
    settings = Settings(backend=BackendSettings(model=ModelSettings(local_dir=str(tmp_path))))
    assert not has_tokenizer(settings)
    (tmp_path / "tokenizer.json").touch()
    assert has_tokenizer(settings)
