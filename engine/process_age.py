"""How long this process has been alive: what a start cost before the first line of ours ran."""

from __future__ import annotations

import os
import sys
import time

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Seconds since this process started, from the kernel's books (proc(5), field 22 of stat).

    Without a /proc: since this module was imported, which misses the interpreter's own start.
    """
    if sys.platform != "linux":
        return time.monotonic() - _IMPORTED
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as stat:
        started_ticks = int(stat.read().rpartition(")")[2].split()[19])
    started = started_ticks / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
