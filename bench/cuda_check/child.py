"""The process of one measurement: `python -m bench.cuda_check.child module:function`.

Each object that the function yields is a line of JSON on stdout; other lines are for the reader.
"""

from __future__ import annotations

import sys
from importlib import import_module

from bench.card import finish
from bench.script import run_script, start_log
from config import read_settings


def main() -> int:
    """Measure what the command line names."""
    settings = read_settings()
    start_log(settings.log_level)
    module, function = sys.argv[1].split(":")
    for results in getattr(import_module(module), function)(settings):
        finish(results)
    return 0


if __name__ == "__main__":
    run_script(main)
