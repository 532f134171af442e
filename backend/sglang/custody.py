"""The processes of one runtime, from our side: marked when they are started, watched while they
live, none left at the end.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from backend.sglang import keeper

MARK = "MINISGL_RUNTIME"  # set in the environment of what is started
KEEPER_S = keeper.PATIENCE_S + 5.0
REAP_S = 2.0


class Custody:
    """Opened before anything is started, closed once."""

    def __init__(self) -> None:
        value = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._mark = f"{MARK}={value}"
        self._value = value
        command = [sys.executable, "-I", "-S", str(Path(keeper.__file__)), self._mark]
        self._keeper = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # who reads ours must not wait for it
            start_new_session=True,  # it outlives us, and what ends us
        )
        self._lives: dict[int, int] = {}  # descriptor of a process -> its pid

    @contextmanager
    def marking(self, more: Mapping[str, str]) -> Iterator[None]:
        """What is started inside is ours to end, and has `more` in its environment. What it needs
        there besides SGLang adds itself; ours is what it was, afterwards.
        """
        before = dict(os.environ)
        os.environ.update({MARK: self._value, **more})
        try:
            yield
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)

    def watch(self, pids: Sequence[int]) -> list[int]:
        """Descriptors that turn readable when one of `pids` has ended."""
        for pid in pids:
            self._lives[os.pidfd_open(pid)] = pid
        return list(self._lives)

    def how_it_ended(self, descriptor: int) -> str:
        """In words. Takes nothing away from whoever waits for the process."""
        pid = self._lives[descriptor]
        try:
            ended = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError:  # it was waited for already
            ended = None
        if ended is None:
            return f"its process {pid} ended"
        if ended.si_code == os.CLD_EXITED:
            return f"its process {pid} ended with exit code {ended.si_status}"
        hint = ", perhaps for want of memory" if ended.si_status == signal.SIGKILL else ""
        return f"its process {pid} was ended by {signal.Signals(ended.si_status).name}{hint}"

    def close(self) -> bool:
        """End every process of the runtime. Whether none is left."""
        family = list(keeper.marked(self._mark))
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            clean = self._keeper.wait(KEEPER_S) == 0
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
            clean = False
        _reap({*family, *self._lives.values()})
        for descriptor in self._lives:
            os.close(descriptor)
        self._lives.clear()
        return clean


def _reap(pids: set[int]) -> None:
    """Take away what is left of children of ours that have ended: without it they would stay in
    the list of processes. Others take care of theirs.
    """
    until = time.monotonic() + REAP_S
    while pids and time.monotonic() < until:
        for pid in list(pids):
            gone = True
            with suppress(OSError):  # none of ours, or taken away already
                gone = os.waitpid(pid, os.WNOHANG)[0] == pid
            if gone:
                pids.discard(pid)
        time.sleep(0.001 if pids else 0.0)
