"""One fleet of engines for each start, whatever `uvicorn --workers` says.

Each worker would start engines of its own: two fleets on one GPU. So the first worker of a
supervisor takes a lock, and one that finds it taken ends the whole start.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path
from typing import IO

import psutil

from backend.interface import StartFailed


class FleetGuard:
    """Held by the process that owns the engines, until it ends."""

    def __init__(self) -> None:
        """Raises StartFailed when another worker of the same supervisor holds it, or when there is
        no place for its lock.
        """
        self._file: IO[bytes] | None = None
        supervisor = multiprocessing.parent_process()
        if supervisor is None or supervisor.pid is None or not _is_uvicorn(supervisor.pid):
            return  # nobody started this process as one of several workers
        try:
            path = Path(tempfile.gettempdir()) / f"minisgl-{os.getuid()}-{supervisor.pid}.lock"
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StartFailed(f"the lock of this start cannot be made: {error}") from None
        self._file = os.fdopen(descriptor, "rb+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            os.kill(supervisor.pid, signal.SIGTERM)  # it would start the refused worker for ever
            raise StartFailed(
                "uvicorn --workers starts one front process each, and each would start engines of "
                "its own: use one worker (REPLICAS=n adds engines)"
            ) from None
        self._path = path

    def release(self) -> None:
        """Let another process take it."""
        if self._file is not None and not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()


def _is_uvicorn(pid: int) -> bool:
    """Another program that starts servers as its children starts each for itself."""
    return any("uvicorn" in word for word in psutil.Process(pid).cmdline())
