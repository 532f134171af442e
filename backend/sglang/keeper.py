"""The process that leaves nothing of a runtime behind: `python keeper.py NAME=VALUE`.

It waits until its stdin ends, which is when its starter closes it or dies, however it dies. Then it
kills every process that has NAME=VALUE in its environment, until there is none. The runtime's
processes are started with it there, and hand it on to whatever they start; they are found by it
also when their parent is gone. It runs as a file, with no module of ours, so that it is there fast.

The kernel would end the runtime's processes with us as well, once they have asked for that;
SGLang's ask when they have loaded torch, and until then nobody would end them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

PATIENCE_S = 30.0  # for a process that the kernel does not let go
TURN_S = 0.01
CALM = 2  # turns in a row without a process: none is just being started


def marked(mark: str) -> Iterator[int]:
    """Processes that have `mark` in the environment they were started with, itself left out."""
    wanted = os.fsencode(mark)
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with suppress(OSError):  # it is gone, or somebody else's
                with open(f"/proc/{name}/environ", "rb") as file:
                    environment = file.read()
                if wanted in environment.split(b"\0"):
                    yield int(name)


def kill_marked(mark: str) -> bool:
    """Kill them until none is left. Whether that came to pass."""
    until = time.monotonic() + PATIENCE_S
    calm = 0
    while calm < CALM and time.monotonic() < until:
        found = list(marked(mark))
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        calm = 0 if found else calm + 1
        time.sleep(TURN_S)
    return calm >= CALM


def main() -> int:
    """Returns 1 when a process could not be ended."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(each, signal.SIG_IGN)  # those are for our starter, and it tells us by its end
    while os.read(0, 1024):
        pass
    return 0 if kill_marked(sys.argv[1]) else 1


if __name__ == "__main__":
    sys.exit(main())
