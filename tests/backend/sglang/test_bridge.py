"""The start and the end of SGLang's processes, whoever ends them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import uvloop

from backend.interface import DeviceLost, Finish, StartFailed, Unsupported
from backend.sglang.backend import SglangBackend
from engine.opening import open_backend
from tests.backend.sglang.engine_double import Script, stand_in
from tests.backend.sglang.opened import driven, open_sglang, settings, write_folder
from tests.conformance.cases import PLAIN, ask

TRACE = """[2026-11-01 12:00:00] Scheduler hit an exception: Traceback (most recent call last):
  File "scheduler.py", line 4931, in run_scheduler_process
    scheduler = Scheduler(
RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.

"""
PATIENCE_S = 20.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return stand_in(monkeypatch)


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is not one that has ended already."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def eventually(holds: object, what: str) -> None:
    assert callable(holds)
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def held() -> tuple[object, ...]:
    """What a backend takes of this process, and has to give back."""
    root = logging.getLogger()
    return (
        len(os.listdir("/proc/self/fd")),
        [child.pid for child in psutil.Process().children(recursive=True)],
        [thread.name for thread in threading.enumerate() if "sglang" in thread.name],
        signal.getsignal(signal.SIGQUIT),
        os.readlink("/proc/self/fd/2"),
        {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        multiprocessing.get_start_method(allow_none=True),
        sys.modules["__main__"],
        list(root.handlers),
        root.level,
    )


@pytest.fixture
def untouched() -> Iterator[None]:
    """Nothing is held at the end that was not at the beginning."""
    uvloop.new_event_loop().close()  # the first one keeps a pipe for all
    before = held()
    yield
    assert held() == before


def test_closing_leaves_nothing_behind(folder: Path, script: Script, untouched: None) -> None:
    for _ in range(3):
        with driven(settings(folder)) as driver:
            driver.run(ask("a"))
            (engine,) = script.engines[-1:]
            assert all(map(alive, engine.get_all_child_pids()))
        assert engine.shut
        assert not any(map(psutil.pid_exists, engine.get_all_child_pids()))


def test_closing_in_the_middle_of_answers_leaves_nothing_behind(
    folder: Path, script: Script, untouched: None
) -> None:
    script.step_s = 0.01
    with driven(settings(folder)) as driver:
        for id in "abc":
            driver.submit(ask(id))
        driver.advance()


@pytest.mark.parametrize("child", [0, 1])
def test_a_child_that_is_killed_is_noticed_without_a_request(
    folder: Path, script: Script, child: int, untouched: None
) -> None:
    with driven(settings(folder)) as driver:
        driver.advance()
        poll = select.poll()
        descriptor = driver.backend.fileno()
        assert descriptor is not None
        poll.register(descriptor, select.POLLIN)
        pid = script.engines[0].get_all_child_pids()[child]
        os.kill(pid, signal.SIGKILL)
        assert poll.poll(5000)
        for _ in range(2):  # and whoever asks again is told again
            with pytest.raises(DeviceLost, match=rf"^SGLang is lost: .*{pid}.* SIGKILL.*memory$"):
                driver.advance()


def test_an_exception_in_the_scheduler_is_the_cause_that_is_told(
    folder: Path, script: Script, untouched: None
) -> None:
    script.fail_at_step = 5
    with driven(settings(folder)) as driver:
        driver.submit(ask("a"))
        cause = r"^SGLang is lost: RuntimeError: CUDA error: an illegal memory access was enc.*$"
        with pytest.raises(DeviceLost, match=cause):
            driver.drain()
        assert 0 < len(driver.answers["a"].tokens) < 12  # what came before was told


def test_a_start_that_fails_in_a_child_is_told_by_its_root_cause(
    folder: Path, script: Script, untouched: None, capfd: pytest.CaptureFixture[str]
) -> None:
    script.start_words = TRACE
    with pytest.raises(StartFailed) as failure:
        open_sglang(settings(folder))
    assert str(failure.value) == (
        "SGLang does not start: RuntimeError: Not enough memory. Please try to increase "
        "--mem-fraction-static."
    )
    assert TRACE in capfd.readouterr().err  # all of it was shown
    assert not any(map(psutil.pid_exists, (engine._scheduler.pid for engine in script.engines)))


def test_a_start_that_fails_without_a_word_is_told_as_sglang_tells_it(
    folder: Path, script: Script, untouched: None
) -> None:
    script.start_words = "nothing that says why\n"
    with pytest.raises(StartFailed, match=r"^SGLang does not start: RuntimeError: Rank 0 sched.*$"):
        open_sglang(settings(folder))


def test_what_sglang_refuses_at_once_is_told_in_its_words(
    folder: Path, script: Script, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(folder, max_position_embeddings=64)
    monkeypatch.setattr("backend.sglang.arguments._context", lambda *_: 100)
    with pytest.raises(StartFailed, match=r"^SGLang does not start: ValueError: .*\(100\) is g.*$"):
        open_sglang(settings(folder))


def test_it_is_opened_in_the_main_thread_alone(folder: Path, script: Script) -> None:
    found: list[BaseException] = []

    def open_it() -> None:
        try:
            open_sglang(settings(folder))
        except Unsupported as error:
            found.append(error)

    thread = threading.Thread(target=open_it)
    thread.start()
    thread.join()
    assert "main thread" in str(found[0])


def test_ctrl_c_is_not_for_its_processes(folder: Path, script: Script) -> None:
    with driven(settings(folder)):
        for pid in script.engines[0].get_all_child_pids():
            (blocked,) = [
                int(line.split()[1], 16)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if line.startswith("SigBlk:")
            ]
            assert blocked & 1 << (signal.SIGINT - 1)


UNGUARDED = """
import multiprocessing, os, sys
from backend.sglang.bridge import undisturbed
sys.stdout.write("once\\n")
sys.stdout.flush()
with undisturbed():
    multiprocessing.set_start_method("spawn", force=True)
    child = multiprocessing.Process(target=os.getpid)
    child.start()
child.join()
sys.exit(child.exitcode)
"""


def test_its_processes_do_not_run_the_script_that_opened_it(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    for command, given in (([str(script)], None), (["-"], UNGUARDED)):
        done = subprocess.run(
            [sys.executable, *command],
            input=given,
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr


def test_what_its_processes_say_is_shown_as_long_as_they_live(
    folder: Path, script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    with driven(settings(folder)):
        script.engines[0].say("long after the start\n")
        heard = ""
        until = time.monotonic() + PATIENCE_S
        while "long after the start" not in heard and time.monotonic() < until:
            heard += capfd.readouterr().err
            time.sleep(0.01)
    assert "long after the start" in heard


ORPHANS = """
import pathlib, sys, time
import pytest
from tests.backend.sglang.engine_double import stand_in
from tests.backend.sglang.opened import open_sglang, settings
script = stand_in(pytest.MonkeyPatch())
backend = open_sglang(settings(pathlib.Path(sys.argv[1])))
pids = script.engines[0].get_all_child_pids()
pids.append(backend.bridge._custody._keeper.pid)
sys.stdout.write(f"{pids}\\n")
sys.stdout.flush()
time.sleep(600)
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM], ids=lambda by: by.name)
def test_no_process_outlives_ours_however_it_ends(
    folder: Path, root: Path, by: signal.Signals
) -> None:
    command = [sys.executable, "-c", ORPHANS, str(folder)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        pids = [int(each) for each in ours.stdout.readline().strip("[]\n").split(",")]
        assert all(map(alive, pids))
        ours.send_signal(by)
        ours.wait()
    # the scheduler's double ends with its stdin; the other one would sleep on
    eventually(lambda: not any(map(alive, pids)), "they live on")


def test_nothing_here_loads_sglang_or_torch_before_it_is_opened(root: Path) -> None:
    modules = sorted(path.stem for path in (root / "backend" / "sglang").glob("*.py"))
    names = [f"backend.sglang.{name}" for name in modules if name != "__init__"]
    program = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "assert not {'sglang', 'torch', 'transformers', 'psutil'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def test_the_engine_of_a_lost_runtime_ends_every_answer_with_the_cause(
    folder: Path, script: Script
) -> None:
    from config import QueueSettings
    from engine.engine import Engine

    script.fail_at_step = 4
    engine = Engine(open_backend(settings(folder)), QueueSettings())
    for id in "ab":
        engine.submit(ask(id, sampling=PLAIN))
    ends: dict[str, Finish] = {}
    until = time.monotonic() + PATIENCE_S
    while len(ends) < 2 and time.monotonic() < until:
        ends |= {delta.id: delta.finish for delta in engine.step(0.1).deltas if delta.finish}
    assert {finish.reason for finish in ends.values()} == {"error"}
    assert engine.failure is not None
    assert "RuntimeError: CUDA error" in engine.failure
    engine.close()


def test_the_opener_of_the_engine_knows_it(folder: Path, script: Script) -> None:
    backend = open_backend(settings(folder))
    try:
        assert type(backend) is SglangBackend
        assert backend.spec.name == "sglang"
    finally:
        backend.close()
