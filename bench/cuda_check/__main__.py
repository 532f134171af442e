"""All that is checked and measured on a CUDA device, a part at a time.

The exit code is 1 when a test failed, a goal that must hold was missed, or something was not
measured. What was measured stands in --out, also when a part is cut short.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from backend.interface import Unsupported
from bench.card import show
from bench.cuda_check.children import ROOT, run_child
from bench.cuda_check.goals import HEADER, verdicts
from bench.cuda_check.parts import FLAGS, PARTS
from bench.cuda_check.results import Results
from bench.script import Parser, run_script
from engine.devices import count_cuda_devices

SHAPES = ROOT / "tests" / "shapes"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="bench.cuda_check", description=__doc__)
    parser.add_argument("--part", choices=PARTS, required=True, help="what to measure")
    for flag, default, meaning in (
        ("--model", SHAPES / "qwen3-0.6b", "its config.json gives the shape; weights are random"),
        ("--large-model", SHAPES / "qwen3-8b", "likewise, for the part `wide`"),
        ("--out", ROOT / "docs" / "results" / "h200.json", "results are merged into it"),
        ("--log", None, "everything that is printed goes there, too"),
    ):
        parser.add_argument(flag, type=Path, metavar="PATH", default=default, help=meaning)
    parser.add_argument("--commit", default=os.environ.get("COMMIT"), help="git's, if not given")
    return parser.parse_args()


def commit_of_the_tree() -> str:
    """What git says, or "unknown" where the tree came without its history."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def told(results: Mapping[str, Any]) -> str:
    """Results as lines: a goal beside its bounds, other numbers as they are."""
    judged = {verdict.goal.key: verdict for verdict in verdicts(results)}
    lines = []
    for key, value in results.items():
        if key in judged:
            what, measured, must, aim, met = judged[key].row()
            lines.append(f"{what}: {measured} (must {must}, aim {aim}): {met}\n")
        elif isinstance(value, (int, float, str)):
            lines.append(f"{key}: {value}\n")
    return "".join(lines)


def measure(
    part: str, folders: Mapping[str, Path], results: Results, write: Callable[[str], None]
) -> list[str]:
    """Run a part, and tell everything as it comes. Returns what failed."""

    def hear(new: dict[str, Any]) -> None:
        write(told(results.add(new)))

    failures = []
    for measurement in PARTS[part]:
        write(f"--- {measurement.name}\n")
        begun = time.monotonic()
        folder = str(folders[measurement.shape].resolve())
        flags = {**FLAGS, **measurement.flags, "MODEL_LOCAL_DIR": folder}
        failure = run_child(measurement, flags, hear, write)
        write(f"--- {measurement.name}: {failure or 'done'}, {time.monotonic() - begun:.0f} s\n")
        failures += [failure] if failure else []
    return failures


def main() -> int:
    """Measure a part and judge it."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not count_cuda_devices():
        raise Unsupported("bench.cuda_check needs a CUDA device, and this machine has none")
    results = Results(options.out)
    commit = options.commit or commit_of_the_tree()
    results.add({"commit": commit})
    begun = time.monotonic()
    with ExitStack() as stack:
        log = options.log and stack.enter_context(options.log.open("w", encoding="utf-8"))

        def write(text: str) -> None:
            for file in filter(None, (sys.stdout, log)):
                file.write(text)
                file.flush()

        folders = {"model": options.model, "large": options.large_model}
        failures = measure(options.part, folders, results, write)
    found = list(verdicts(results.fresh))
    took = round(time.monotonic() - begun, 1)
    facts = {"commit": commit, "device": results.fresh.get("device"), "took_s": took}
    results.conclude(options.part, {**facts, "failures": failures})
    show(f"{options.part}: {took:.0f} s, {options.out}", HEADER, [each.row() for each in found])
    sys.stdout.writelines(f"{failure}\n" for failure in failures)
    return 1 if failures or not all(verdict.must_met for verdict in found) else 0


if __name__ == "__main__":
    run_script(main)
