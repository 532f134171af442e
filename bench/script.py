"""How every script starts and ends: one parser, one log, one way to fail."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from backend.interface import EngineError
from config import ConfigError

_IMPORTED = time.monotonic()


class Parser(argparse.ArgumentParser):
    """Command line of a script. A wrong argument is one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")


def positive(text: str) -> int:
    """An argument that counts something: 1 or more."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


positive.__name__ = "count"  # argparse says: invalid count value


def run_script(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`.

    An error of ours is one line on stderr and exit code 1; Ctrl-C is the shell's 130, and a reader
    of stdout that has gone (`| head -1`) its 141.
    """
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        # what is still buffered goes nowhere, or the interpreter complains when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (EngineError, ConfigError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def start_log(level: str) -> None:
    """Our own messages from `level` on, other people's from WARNING on, to stderr."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for package in ("backend", "engine"):
        logging.getLogger(package).setLevel(level)


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
