"""How every script starts and ends: one parser, one log, one way to fail."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from backend.interface import EngineError
from config import ConfigError
from engine.log import start_log as start_log
from engine.process_age import process_age as process_age


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


def counts(text: str) -> tuple[int, ...]:
    """An argument that lists counts, separated by commas."""
    return tuple(positive(part) for part in text.split(","))


counts.__name__ = "list of counts"


def amount(text: str) -> float:
    """An argument that measures something: more than 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


amount.__name__ = "amount"


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
