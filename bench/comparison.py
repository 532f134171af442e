"""The same requests through another engine, in a process of its own, after ours has ended: neither
takes memory or threads from the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from backend.interface import BackendFailed, BackendSpec, Unsupported
from bench.summary import median_index
from bench.workloads import Workload

PEERS = {"transformers": "bench.transformers_peer"}  # a name, and the module that runs it


@dataclass(frozen=True, slots=True)
class Order:
    """What a peer is to run; its stdin, as JSON."""

    folder: str  # a Hugging Face folder
    device: str
    made_up: bool  # random weights: the folder has a config.json only
    temperature: float
    jobs: list[tuple[list[int], int]]  # prompt ids, new tokens
    repeat: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a peer came to; the last line of its stdout, as JSON."""

    name: str  # engine, version, format and attention
    output_tokens: int
    durations_s: list[float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A peer beside us, by the median of its runs."""

    name: str
    output_tokens_per_s: float
    ratio: float  # ours over theirs
    runs: list[float]  # output tokens a second


def order_for(workload: Workload, spec: BackendSpec, made_up: bool, repeat: int) -> Order:
    """Raises Unsupported when there is no checkpoint that a peer could load."""
    if spec.folder is None:
        raise Unsupported(f"the backend {spec.name} has no model folder that a peer could load")
    return Order(
        folder=spec.folder,
        device=spec.device,
        made_up=made_up,
        temperature=workload.temperature,
        jobs=[(list(job.prompt), job.new_tokens) for job in workload.jobs],
        repeat=repeat,
    )


def compare(peer: str, order: Order, ours: float) -> Comparison:
    """Run `peer` and set it beside `ours`, in output tokens a second.

    Raises BackendFailed with the peer's last words when it fails.
    """
    child = subprocess.run(
        [sys.executable, "-m", PEERS[peer]],
        input=json.dumps(asdict(order)),
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        check=False,
    )
    if child.returncode:
        words = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise BackendFailed(f"{peer} failed in the comparison: {words[-1]}")
    return judge(Outcome(**json.loads(child.stdout.strip().splitlines()[-1])), ours)


def judge(outcome: Outcome, ours: float) -> Comparison:
    """The median run of a peer beside `ours`."""
    rates = [round(outcome.output_tokens / seconds, 2) for seconds in outcome.durations_s]
    rate = rates[median_index(rates)]
    return Comparison(outcome.name, rate, round(ours / rate, 3), rates)
