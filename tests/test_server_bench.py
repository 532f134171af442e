"""`server_bench.py` as a user starts it, and inside this process against a server that runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

import server_bench
from backend.interface import EngineError, Unavailable
from bench.answer_stream import ENDPOINTS
from bench.http_load import OpenLoop
from bench.server_process import free_port, own_server

FAKE = {"OMP_NUM_THREADS": "1", "LOG_LEVEL": "WARNING", "BACKEND_IMPL": "fake"}
TIMES = ("ttft_ms", "itl_ms", "e2e_ms")
DEADLINE_S = 30.0

Bench = Callable[..., tuple[int, Any]]


def start(root: Path, *arguments: str, **flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "server_bench.py", *arguments],
        env={**os.environ, **FAKE, **flags},
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real server over the fake backend, with a key, four rows and a short queue."""
    flags = {**FAKE, "API_KEY": "secret, other", "MAX_RUNNING": "4", "MAX_QUEUED": "40"}
    flags["FAKE_STEP_MS"] = "1"  # or all of an answer arrives at once
    with pytest.MonkeyPatch.context() as patch:
        for flag, value in flags.items():
            patch.setenv(flag, value)
        with own_server() as url:
            yield url


@pytest.fixture
def bench(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the benchmark against that server: its exit code, and its last line."""
    monkeypatch.setenv("API_KEY", "secret, other")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is pytest's

    def run(*arguments: str) -> tuple[int, Any]:
        target = ("--base-url", url, "--timeout", "30")
        monkeypatch.setattr(sys, "argv", ["server_bench.py", *target, *arguments])
        code = server_bench.main()
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def check_promised_keys(report: Any, requests: int) -> None:
    for times in TIMES:
        assert 0 <= report[times]["p50"] <= report[times]["p90"] <= report[times]["p99"]
    assert (report["requests"], report["failed"], report["failures"]) == (requests, 0, {})
    assert 0 < report["output_tokens_per_s"] < report["total_tokens_per_s"]
    assert report["duration_s"] > 0
    assert 0 < report["client_cpu_share"] < 1.2
    assert (report["model"], report["device"]) == ("fake", "cpu")
    assert {"python", "fastapi", "torch"} <= report["versions"].keys()


def test_it_starts_a_server_measures_it_and_leaves_nothing_behind(root: Path) -> None:
    done = start(root, "--max-new-tokens", "8", "--num-requests", "4", FAKE_STEP_MS="2")
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, "")
    report = json.loads(out.splitlines()[-1])
    check_promised_keys(report, requests=4)
    assert (report["endpoint"], report["concurrency"]) == ("generate", 4)
    assert report["output_tokens"] == 32
    assert re.search(r"output tokens/s .*\d", out)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"BACKEND_IMPL": "vapour"}, "BACKEND_IMPL=vapour"),
        ({"MODEL_LOCAL_DIR": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_server_that_cannot_start_is_one_line_and_exit_code_1(
    root: Path, flags: dict[str, str], says: str
) -> None:
    done = start(root, **flags)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 1
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_benchmark_and_its_server(
    root: Path, sent: signal.Signals, code: int
) -> None:
    done = start(root, "--num-requests", "4", FAKE_STEP_MS="1000")
    client = psutil.Process(done.pid)
    deadline = time.monotonic() + DEADLINE_S
    while [each.status for each in client.net_connections()] != ["ESTABLISHED"] * 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = client.children(recursive=True)
    assert len(started) == 2  # the server and its engine
    done.send_signal(sent)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert not any(process.is_running() for process in started)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_is_measured_alike(bench: Bench, endpoint: str) -> None:
    code, report = bench(
        *("--endpoint", endpoint, "--max-new-tokens", "16", "--num-requests", "6"),
        *("--prompt-tokens", "20", "--concurrency", "3"),
    )
    assert code == 0
    check_promised_keys(report, requests=6)
    assert (report["endpoint"], report["concurrency"]) == (endpoint, 3)
    assert report["output_tokens"] == 6 * 16
    assert report["prompt_tokens"] >= 6 * 20


def test_a_workload_has_its_own_ids_and_lengths(bench: Bench) -> None:
    code, report = bench("--workload", "mix", "--repeat", "2")
    assert code == 0
    check_promised_keys(report, requests=32)
    assert (report["endpoint"], report["workload"]) == ("completions", "mix")
    assert (report["prompt_tokens"], report["output_tokens"]) == (4637, 2584)
    assert report["cached_tokens"] == 0  # the run before did not help
    assert len(report["runs"]) == 2


def test_an_open_loop_lasts_as_long_as_its_visitors_keep_coming(bench: Bench) -> None:
    code, report = bench(
        *("--request-rate", "50", "--num-requests", "10", "--max-new-tokens", "4"),
        *("--slo-ttft-ms", "10000", "--slo-itl-ms", "10000"),
    )
    assert code == 0
    assert report["request_rate"] == 50
    assert "concurrency" not in report
    last = OpenLoop(50, seed=0).arrivals(10)[-1]
    assert report["duration_s"] > last
    assert report["goodput"]["share"] == 1
    rate = pytest.approx(10 / report["duration_s"], rel=0.01)
    assert report["goodput"]["requests_per_s"] == rate


def test_a_sweep_has_every_load_and_a_picture(bench: Bench, tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    code, report = bench(
        *("--sweep", "1,2,4", "--num-requests", "8", "--max-new-tokens", "8"),
        *("--plot", str(picture)),
    )
    assert code == 0
    assert [each["concurrency"] for each in report["sweep"]] == [1, 2, 4]
    last = report["sweep"][-1]
    assert {name: report[name] for name in last} == last
    names = [element.tag.rpartition("}")[2] for element in ElementTree.parse(picture).iter()]
    assert names.count("circle") == 2 * 2 * 3  # panels, percentiles, loads


def test_prompts_come_from_a_file_and_are_asked_in_turn(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\nthree\n")
    code, report = bench("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4")
    assert code == 0
    assert (report["requests"], report["prompt_tokens"]) == (2, len("one") + len("three") + 2)


def test_what_the_server_refuses_is_counted_by_cause_and_fails(bench: Bench) -> None:
    code, report = bench("hello", "--max-new-tokens", "9000", "--num-requests", "3")
    assert code == 1
    assert (report["requests"], report["failed"]) == (3, 3)
    assert report["failures"] == {"HTTP 400 invalid_request_error": 3}
    assert report["ttft_ms"]["p50"] is None
    assert report["output_tokens_per_s"] == 0


def test_a_sweep_counts_what_failed_at_each_load(bench: Bench) -> None:
    code, report = bench("hello", "--max-new-tokens", "9000", "--sweep", "1,2", "--seed", "1")
    assert code == 1
    assert [each["failed"] for each in report["sweep"]] == [64, 64]
    assert report["failures"] == {"HTTP 400 invalid_request_error": 64}


def test_a_full_queue_fails_some_and_serves_the_others(bench: Bench) -> None:
    code, report = bench("hello", "--max-new-tokens", "40", "--num-requests", "120")
    assert code == 1
    assert 0 < report["failed"] < 120
    assert report["failures"] == {"HTTP 429 queue_full": report["failed"]}
    assert report["ttft_ms"]["p50"] > 0


def test_a_wrong_key_is_one_line(bench: Bench) -> None:
    with pytest.raises(Unavailable, match="/v1/models answers 401 Unauthorized"):
        bench("--api-key", "guess")
    assert bench("--api-key", "other", "--max-new-tokens", "2", "--num-requests", "1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--concurrency 2 --request-rate 3", "not allowed with"),
        ("--sweep 1,2 --concurrency 3", "not allowed with"),
        ("--sweep 1,x", "invalid list of counts value"),
        ("--sweep 1,,2", "invalid list of counts value"),
        ("--sweep 0,2", "invalid list of counts value"),
        ("--request-rate nan", "invalid amount value"),
        ("--request-rate 0", "invalid amount value"),
        ("--timeout inf", "invalid amount value"),
        ("--plot curve.svg", "--plot draws a --sweep"),
        ("--sweep 1,2 --plot /nowhere/curve.svg", "/nowhere/curve.svg: there is no such folder"),
        ("--workload mix hello", "not allowed with"),
        ("--workload mix --endpoint chat", "only --endpoint completions takes"),
        ("--workload mix --max-new-tokens 4", "--max-new-tokens goes with a prompt"),
        ("--workload mix --no-ignore-eos", "--ignore-eos goes with a prompt"),
        ("--prompts a.txt --prompt-tokens 3", "not allowed with"),
        ("--endpoint embeddings", "invalid choice"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["server_bench.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        server_bench.parse()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--workload mix --num-requests 33", "lower --num-requests"),
        ("--concurrency 65", "65 requests in flight were asked for, and 64 in all"),
        ("--sweep 1,64 --num-requests 8", "raise --num-requests"),
        ("--prompts /nowhere.txt", "/nowhere.txt cannot be read"),
        ("--base-url localhost", "localhost is no address of a server"),
        # not as a part of the test's name: several processes that test must agree on that
        pytest.param(
            f"--base-url http://127.0.0.1:{free_port()}", "no server answers at", id="nobody"
        ),
    ],
)
def test_what_cannot_be_measured_is_told_before_a_server_starts(
    arguments: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["server_bench.py", *arguments.split()])
    monkeypatch.setattr(server_bench, "own_server", lambda: pytest.fail("a server was started"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(EngineError, match=says) as refused:
        server_bench.main()
    assert "\n" not in str(refused.value)


def test_it_loads_without_torch_and_without_the_server(root: Path) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'fastapi', 'api'}"
    program = f"import sys, server_bench; print({heavy} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
