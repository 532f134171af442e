"""Batch jobs as real processes: killed, interrupted, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.end_to_end.server_process import PATIENCE_S, ROOT, eventually

LINES = 12
WHOLE_JOB_S = 3 * PATIENCE_S  # a start with the real model, and every answer


def write_input(path: Path, count: int = LINES, **fields: Any) -> None:
    """A batch file of chats that differ."""
    with path.open("w") as file:
        for index in range(count):
            messages = [{"role": "user", "content": f"Name a city that begins with {index}."}]
            body = {"messages": messages, "max_tokens": 4, "temperature": 0, **fields}
            line = {
                "custom_id": f"line-{index}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")


@contextmanager
def job(folder: Path, *more: str, **flags: object) -> Iterator[subprocess.Popen[str]]:
    """`python -m api.batch` from `in` to `out`, in the end gone, engines included."""
    command = [sys.executable, "-m", "api.batch", str(folder / "in"), "-o", str(folder / "out")]
    environment = os.environ | {name: str(value) for name, value in flags.items()}
    process = subprocess.Popen(
        [*command, *more], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answers(path: Path) -> list[dict[str, Any]]:
    """The whole lines so far."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(path: Path, count: int) -> Sequence[dict[str, Any]]:
    return eventually(lambda: found if len(found := answers(path)) >= count else None, "answers")


def test_a_job_that_is_killed_goes_on_and_answers_each_line_once(
    small_model: Path, tmp_path: Path
) -> None:
    write_input(tmp_path / "in")
    flags = {
        "BACKEND_IMPL": "hf",
        "MODEL_LOCAL_DIR": small_model,
        "DEVICE": "cpu",
        "PAGE_TOKEN_BUDGET": 4096,
    }
    with job(tmp_path, "--concurrency", "2", **flags) as first:
        wait_for(tmp_path / "out", 3)
        engines = psutil.Process(first.pid).children(recursive=True)
        first.kill()
        first.wait(PATIENCE_S)
        eventually(lambda: not any(each.is_running() for each in engines), "the engines' end")
    kept = answers(tmp_path / "out")
    assert 3 <= len(kept) < LINES
    with (tmp_path / "out").open("a") as file:
        file.write('{"id":"batch_req-0123","custom_id":"li')  # as a kill may leave it
    with job(tmp_path, **flags) as second:
        _, told = second.communicate(timeout=WHOLE_JOB_S)
        assert second.returncode == 0, told
    assert f"{len(kept)} of {LINES} lines are answered already" in told
    done = answers(tmp_path / "out")
    assert done[: len(kept)] == kept
    assert Counter(each["custom_id"] for each in done) == {f"line-{i}": 1 for i in range(LINES)}
    assert {each["response"]["status_code"] for each in done} == {200}
    assert all(each["response"]["body"]["choices"][0]["message"]["content"] for each in done)


def test_ctrl_c_ends_a_job_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    write_input(tmp_path / "in", max_tokens=20, ignore_eos=True)
    flags = {"BACKEND_IMPL": "fake", "FAKE_STEP_MS": 20, "LOG_LEVEL": "WARNING"}
    with job(tmp_path, "--concurrency", "1", **flags) as first:
        wait_for(tmp_path / "out", 2)
        engines = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGINT)
        _, told = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 130
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    assert engines
    assert not any(each.is_running() for each in engines)
    kept = answers(tmp_path / "out")
    assert (tmp_path / "out").read_text().endswith("\n")
    with job(tmp_path, BACKEND_IMPL="fake", API_KEY="secret", MAX_QUEUED=1) as second:
        second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 0
    done = answers(tmp_path / "out")
    assert done[: len(kept)] == kept
    assert Counter(each["custom_id"] for each in done) == {f"line-{i}": 1 for i in range(LINES)}


def test_the_exit_code_says_whether_answers_are_errors_or_there_was_no_job(tmp_path: Path) -> None:
    write_input(tmp_path / "in", count=2, temperature=-1)
    with job(tmp_path, BACKEND_IMPL="fake") as failing:
        _, told = failing.communicate(timeout=PATIENCE_S)
        assert (failing.returncode, "2 of 2 answers are errors" in told) == (1, True)
    with (tmp_path / "in").open("a") as file:
        file.write("{}\n")
    with job(tmp_path, BACKEND_IMPL="fake") as malformed:
        _, told = malformed.communicate(timeout=PATIENCE_S)
        assert (malformed.returncode, "line 3: custom_id" in told) == (2, True)
        assert len(told.splitlines()) == 1
    with job(tmp_path, BACKEND_IMPL="none") as misled:
        _, told = misled.communicate(timeout=PATIENCE_S)
        assert (misled.returncode, "BACKEND_IMPL" in told) == (2, True)
