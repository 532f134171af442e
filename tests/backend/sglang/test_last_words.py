"""The cause of a death, from what was written to stderr."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from backend.sglang.last_words import LastWords, root_cause

PLAIN = """[2026-11-01 12:00:00] Loading weights
[2026-11-01 12:00:09] Scheduler hit an exception: Traceback (most recent call last):
  File "/x/scheduler.py", line 4931, in run_scheduler_process
    scheduler = Scheduler(
                ^^^^^^^^^^
  File "/x/pool.py", line 12, in __init__
    raise RuntimeError(
RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.

[2026-11-01 12:00:09] Received sigquit from a child process.
"""
CHAINED = """[12:00:09 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/x/graph.py", line 1, in capture
    run()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/x/scheduler.py", line 4931, in run_scheduler_process
    raise Exception(
Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate 2.00 GiB.
Possible solutions:
1. set --mem-fraction-static to a smaller value
"""
RANKS = """[12:00:09 TP1] Scheduler hit an exception: Traceback (most recent call last):
  File "/x/model.py", line 7, in load
[12:00:09 TP0] still loading
KeyError: 'model.norm.weight'

[12:00:10 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/x/dist.py", line 7, in all_reduce
torch.distributed.DistBackendError: NCCL error: remote process exited
"""
SPAWNED = """Traceback (most recent call last):
  File "<string>", line 1, in <module>
  File "/x/spawn.py", line 122, in spawn_main
ModuleNotFoundError: No module named 'sgl_kernel'
"""
NO_MESSAGE = """Traceback (most recent call last):
  File "/x/a.py", line 1, in run
AssertionError
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (PLAIN, "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."),
        (
            CHAINED,
            "Exception: Capture cuda graph failed: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (RANKS, "KeyError: 'model.norm.weight'"),
        (SPAWNED, "ModuleNotFoundError: No module named 'sgl_kernel'"),
        (NO_MESSAGE, "AssertionError"),
        (
            "terminate called after throwing an instance of 'c10::Error'\n  what(): x\n",
            "terminate called after throwing an instance of 'c10::Error'",
        ),
        ("Fatal Python error: Segmentation fault\n", "Fatal Python error: Segmentation fault"),
        (
            "[12:00:00] Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)\n",
            "watchdog timeout (self.watchdog_timeout=300, self.soft=False)",
        ),
        ("[12:00:00] all is well\n", None),
        ("", None),
        ("Traceback (most recent call last):\n", None),
    ],
)
def test_the_cause_is_one_line(text: str, cause: str | None) -> None:
    assert root_cause(text) == cause


def test_what_is_started_inside_is_heard_and_shown_and_ours_is_not_changed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = LastWords()
    with words.heard():
        child = subprocess.Popen(["sh", "-c", "sleep 0.2; printf '%s' \"$0\" >&2", SPAWNED])
    os.write(2, b"ours\n")
    child.wait()
    assert words.cause() == "ModuleNotFoundError: No module named 'sgl_kernel'"
    words.close(5.0)
    shown = capfd.readouterr().err
    assert SPAWNED in shown
    assert "ours\n" in shown


def test_what_was_said_long_before_is_another_story(monkeypatch: pytest.MonkeyPatch) -> None:
    words = LastWords()
    begun = time.monotonic()
    with words.heard():
        os.write(2, SPAWNED.encode())
        assert words.cause() is not None
        monkeypatch.setattr(time, "monotonic", lambda: begun + 100)
        os.write(2, b"and then it ended\n")
        while len(words._heard) < 2:
            time.sleep(0.01)
    monkeypatch.undo()
    assert words.cause() is None
    words.close(5.0)


def test_no_more_is_remembered_than_a_death_needs() -> None:
    words = LastWords()
    with words.heard():
        for _ in range(40):
            os.write(2, b"." * 10_000)
    words.close(5.0)
    assert sum(len(what) for _, what in words._heard) <= 1 << 18
