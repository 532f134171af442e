"""The scripts as a user starts them: on the fake backend, and once on the small real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cli_demo
import local_bench
import smoke_test
from backend.interface import SamplingParams
from config import BackendSettings, Settings
from engine.llm import LLM

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

QUIET = {"OMP_NUM_THREADS": "1", "LOG_LEVEL": "WARNING"}
FAKE = {**QUIET, "BACKEND_IMPL": "fake"}
LONG_PROMPT = "a prompt of more bytes than there are tokens in two pages"


@pytest.fixture
def run(root: Path) -> Run:
    """Runs a script with flags, and lines on its stdin, to its end."""

    def start(*command: str, flags: dict[str, str] | None = None, stdin: str = "") -> Done:
        return subprocess.run(
            [sys.executable, *command],
            env={**os.environ, **(FAKE if flags is None else flags)},
            cwd=root,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return start


def last_line(done: Done) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("prompt", ["Hello mini-sglang", LONG_PROMPT])
def test_the_smoke_test_passes_on_the_fake_backend(run: Run, prompt: str) -> None:
    done = run("smoke_test.py", "--max-new-tokens", "32", prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("pass\n")
    assert re.search(r"first token \d+\.\d\d s after the start of the process", done.stdout)


def test_the_smoke_test_says_how_much_the_cache_answered(run: Run) -> None:
    cached = run("smoke_test.py", LONG_PROMPT)
    assert f"the cache answered 48 of {len(LONG_PROMPT) + 1}" in cached.stdout
    without = run("smoke_test.py", LONG_PROMPT, flags={**FAKE, "PREFIX_CACHE": "0"})
    assert without.returncode == 0
    assert "the cache answered 0 of" in without.stdout


def test_the_smoke_test_passes_on_the_small_model(run: Run, small_model: Path) -> None:
    done = run(
        "smoke_test.py",
        *("--max-new-tokens", "8", "The capital of France is"),
        flags={**QUIET, "MODEL_LOCAL_DIR": str(small_model)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout


@pytest.mark.parametrize("tampered", [{"text": "else"}, {"token_ids": [1]}, {"token_ids": []}])
def test_the_smoke_test_notices_a_stream_that_differs(tampered: dict[str, Any]) -> None:
    sampling = SamplingParams(max_new_tokens=8)
    with LLM(Settings(backend=BackendSettings(impl="fake"))) as llm:
        streamed = smoke_test.stream(llm, LONG_PROMPT, sampling)
        assert all(ok for ok, _ in smoke_test.checks(llm, LONG_PROMPT, sampling, streamed, True))
        wrong = replace(streamed, **tampered)
        assert not all(ok for ok, _ in smoke_test.checks(llm, LONG_PROMPT, sampling, wrong, True))


def test_the_smoke_test_notices_a_page_that_stays_leased() -> None:
    sampling = SamplingParams(max_new_tokens=8)
    with LLM(Settings(backend=BackendSettings(impl="fake"))) as llm:
        streamed = smoke_test.stream(llm, "short", sampling)
        unfinished = llm.stream(LONG_PROMPT, SamplingParams(max_new_tokens=64, ignore_eos=True))
        next(unfinished)
        results = smoke_test.checks(llm, "short", sampling, streamed, True)
        (failed,) = [what for ok, what in results if not ok]
        assert "pages are leased" in failed


@pytest.mark.parametrize("script", ["smoke_test.py", "cli_demo.py", "local_bench.py"])
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({**QUIET, "BACKEND_IMPL": "vapour"}, "BACKEND_IMPL=vapour"),
        ({**FAKE, "MODEL_LOCAL_DIR": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_1(
    run: Run, script: str, flags: dict[str, str], says: str
) -> None:
    done = run(script, flags=flags)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (smoke_test.main, "--fast", "unrecognized arguments: --fast"),
        (cli_demo.main, "--temperature hot", "invalid float value"),
        (cli_demo.main, "--api-key secret", "--api-key goes with --base-url"),
        (local_bench.main, "--repeat 0", "invalid count value: '0'"),
        (local_bench.main, "--workload mix prompt", "not allowed with"),
        (local_bench.main, "--workload mix --max-new-tokens 8", "its own lengths"),
        (local_bench.main, "--decode-step --compare transformers", "goes with --repeat"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    main: Callable[[], int],
    arguments: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert says in line


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("smoke_test.py", "--max-new-tokens", "9000"), "exceed the context of 8,192"),
        (("cli_demo.py", "--temperature", "-1"), "temperature must be a number between 0 and 100"),
        (("local_bench.py", "--workload", "mix", "--num-requests", "33"), "lower --num-requests"),
        (("local_bench.py", "--compare", "transformers"), "no model folder that a peer could load"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_code_1(
    run: Run, command: tuple[str, ...], says: str
) -> None:
    done = run(*command)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr


@pytest.mark.parametrize("script", ["smoke_test.py", "local_bench.py"])
def test_a_lost_device_fails_the_script(run: Run, script: str) -> None:
    done = run(script, flags={**FAKE, "FAKE_FAIL_AT_STEP": "2"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("the backend failed")


@pytest.mark.parametrize(
    ("command", "requests", "tokens"),
    [
        (("a prompt", "--max-new-tokens", "16"), 1, 16),
        (("a prompt", "--max-new-tokens", "16", "--num-requests", "3", "--repeat", "3"), 3, 48),
        (("--workload", "mix", "--concurrency", "4"), 32, 2584),
        (("--workload", "reference", "--num-requests", "2"), 2, None),
    ],
)
def test_the_last_line_of_the_local_bench_has_every_promised_key(
    run: Run, command: tuple[str, ...], requests: int, tokens: int | None
) -> None:
    report = last_line(run("local_bench.py", *command))
    for times in ("ttft_ms", "itl_ms", "e2e_ms"):
        assert 0 <= report[times]["p50"] <= report[times]["p90"] <= report[times]["p99"]
    assert (report["requests"], report["failed"]) == (requests, 0)
    assert tokens in (None, report["output_tokens"])
    assert 0 < report["output_tokens_per_s"] < report["total_tokens_per_s"]
    assert report["duration_s"] > 0
    assert report["model"] == "fake"
    assert report["device"].startswith("cpu: ")
    assert {"python", "torch", "transformers"} <= report["versions"].keys()
    assert report["roofline_share"] is None  # the fake backend has no weights to read


def test_no_run_of_the_local_bench_answers_from_the_one_before(run: Run) -> None:
    report = last_line(run("local_bench.py", LONG_PROMPT, "--repeat", "3"))
    assert report["cached_tokens"] == 0
    assert len(report["runs"]) == 3


def test_decode_steps_are_timed_at_three_batch_sizes(run: Run) -> None:
    report = last_line(run("local_bench.py", "--decode-step"))
    assert [step["batch"] for step in report["decode_steps"]] == [1, 8, 32]
    for step in report["decode_steps"]:
        assert step["step_ms"]["p50"] > 0
        assert step["context"] == pytest.approx(256, abs=8)


def test_the_small_model_is_compared_with_transformers(run: Run, small_model: Path) -> None:
    done = run(
        *("local_bench.py", "The capital of France is", "--max-new-tokens", "4"),
        *("--compare", "transformers"),
        flags={**QUIET, "MODEL_LOCAL_DIR": str(small_model)},
    )
    report = last_line(done)
    assert report["compare"]["name"].startswith("transformers ")
    ours, theirs = report["output_tokens_per_s"], report["compare"]["output_tokens_per_s"]
    assert report["compare"]["ratio"] == pytest.approx(ours / theirs, abs=1e-3)
    assert 0 < report["roofline_share"] < 1


def statuses(output: str) -> list[tuple[str, int, int]]:
    """How each answer of a chat ended, its cached tokens, and its prompt tokens."""
    found = re.findall(r"\((\w+)\), first after .*?cached (\d+)/(\d+) tokens", output, re.DOTALL)
    return [(ending, int(cached), int(prompt)) for ending, cached, prompt in found]


def test_a_chat_remembers_what_was_said_and_caches_it(run: Run) -> None:
    done = run("cli_demo.py", "--max-new-tokens", "8", stdin="hello\nand now?\n/reset\nhello\n")
    assert done.returncode == 0, done.stderr
    (_, cold, first), (_, cached, second), (_, _, again) = statuses(done.stdout)
    assert cold == 0
    assert first < second
    assert 0 < cached < second
    assert again == first


def test_a_chat_ends_at_exit_and_survives_a_question_that_is_too_long(run: Run) -> None:
    done = run("cli_demo.py", stdin=f"{'long ' * 2000}\n/exit\nnever asked\n")
    assert done.returncode == 0, done.stderr
    assert "exceed the context of 8,192" in " ".join(done.stdout.split())
    assert statuses(done.stdout) == []


@pytest.mark.parametrize("script", ["smoke_test.py", "cli_demo.py"])
def test_a_reader_that_has_gone_ends_a_script_quietly(root: Path, script: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, **FAKE},
        cwd=root,
        input=b"hello\n",
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode != 0


def test_a_chat_without_a_stdin_ends_at_once(run: Run) -> None:
    closed = "import os, sys; os.close(0); os.execl(*[sys.executable] * 2, 'cli_demo.py')"
    done = run("-c", closed)
    assert (done.returncode, done.stderr) == (0, "")
    assert "on cpu" in done.stdout


def test_ctrl_c_stops_the_answer_and_not_the_chat(root: Path) -> None:
    chat = subprocess.Popen(
        [sys.executable, "cli_demo.py", "--max-new-tokens", "50"],
        env={**os.environ, **FAKE, "FAKE_STEP_MS": "50", "COLUMNS": "200"},
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdout.readline()  # the greeting
        chat.stdin.write("tell me a long story\n")
        chat.stdin.flush()
        begun = chat.stdout.read(3)
        chat.send_signal(signal.SIGINT)
        answer = begun + chat.stdout.readline()
        status = chat.stdout.readline()
        rest, _ = chat.communicate("and then?\n", timeout=60)
    assert statuses(status)[0][0] == "stopped"
    assert chat.returncode == 0
    (_, cached, prompt) = statuses(rest)[0]
    assert cached > 0
    assert prompt > statuses(status)[0][2] + len(answer.strip())  # a byte is a token here
