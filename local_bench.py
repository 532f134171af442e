"""The engine without HTTP: throughput, latency, and the share of what the device could do.

A run submits the whole workload, or --concurrency requests at a time, and ends with the last
answer. Ends of text are ignored: every answer has its full length. Before the clock starts, as many
requests as run at once are warmed up with 32 prompt tokens and 4 new ones; before each run the
prefix cache is emptied, so that no run answers from the one before. (Copies of one prompt do share
it within a run; the card says how many tokens were cached.)

The model and the engine's limits come from the environment, such as MODEL_LOCAL_DIR. The reference
workload wants MAX_RUNNING=256 MAX_STEP_TOKENS=16384 and a large GPU.

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from backend.interface import BackendSpec
from bench.card import finish, milliseconds, percent, show, summary_rows
from bench.comparison import PEERS, Comparison, compare, order_for
from bench.decode_step import BATCHES, CONTEXT, DecodeStep, decode_step, measure_batches
from bench.device import describe, measure_ceiling
from bench.drive import Driver, Measured
from bench.opened_engine import opened
from bench.progress import progress_bar
from bench.roofline import Ceiling, roofline_share
from bench.script import Parser, positive, run_script, start_log
from bench.summary import Summary, median_index, spread, summarise
from bench.workloads import WORKLOADS, Workload, repeated
from config import Settings, read_settings
from engine.versions import versions

if TYPE_CHECKING:
    from engine.llm import LLM

WARM_PROMPT, WARM_NEW = 32, 4  # tokens
# that speed is owed to
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def parse() -> argparse.Namespace:
    """The command line. What contradicts itself is an error."""
    parser = Parser(
        prog="local_bench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("prompt", nargs="?", help="one prompt, --num-requests times")
    what.add_argument("--workload", choices=WORKLOADS, help="a fixed set of requests")
    what.add_argument(
        "--decode-step",
        action="store_true",
        help=f"time single decode steps at context {CONTEXT}, batch {BATCHES}",
    )
    for name, default, meaning in (
        ("--max-new-tokens", None, "for a prompt; 128 if not given"),
        ("--num-requests", None, "copies of the prompt, or the first N of a workload"),
        ("--concurrency", None, "requests in flight; all if not given"),
        ("--repeat", 1, "runs; the median one is shown"),
    ):
        parser.add_argument(name, type=positive, metavar="N", default=default, help=meaning)
    parser.add_argument(
        "--compare", choices=PEERS, help="then run the same requests through another engine"
    )
    options = parser.parse_args()
    if options.max_new_tokens and (options.workload or options.decode_step):
        parser.error("--max-new-tokens goes with a prompt: a workload has its own lengths")
    if options.decode_step and (options.compare or options.num_requests or options.concurrency):
        parser.error("--decode-step goes with --repeat only")
    return options


def choose(options: argparse.Namespace, llm: LLM) -> Workload:
    """The workload that the command line asks for."""
    if options.workload:
        workload = WORKLOADS[options.workload](llm.spec.vocabulary)
        return workload.first(options.num_requests) if options.num_requests else workload
    prompt = tuple(llm.tokenizer.encode(options.prompt or "Hello mini-sglang"))
    return repeated(prompt, options.max_new_tokens or 128, options.num_requests or 1)


def measure(llm: LLM, workload: Workload, concurrency: int, repeat: int) -> list[Measured]:
    """Warm up, then run `repeat` times from an empty cache."""
    warm_up = workload.warm_up(concurrency, WARM_PROMPT, WARM_NEW)
    Driver(llm.engine, warm_up, concurrency, "warm-up").run()
    runs = []
    with progress_bar("tokens", repeat * workload.new_tokens) as advance:
        for turn in range(repeat):
            llm.engine.flush()
            runs.append(Driver(llm.engine, workload, concurrency, f"run-{turn}", advance).run())
    return runs


def ceiling_of(spec: BackendSpec) -> Ceiling | None:
    """What the device does at best, measured; None where there are no weights to read."""
    if not spec.weight_bytes:
        return None
    return measure_ceiling(spec.device, spec.dtype)


def facts(spec: BackendSpec, ceiling: Ceiling | None) -> dict[str, object]:
    """What a reader needs to know before comparing results."""
    return {
        "model": spec.model,
        "device": describe(spec.device),
        "backend": spec.name,
        "dtype": spec.dtype,
        "attention": spec.attention,
        "versions": versions(PACKAGES),
        "ceiling": ceiling and asdict(ceiling),
    }


@dataclass(frozen=True, slots=True)
class Result:
    """Several runs of a workload: the one with the median throughput, and how far they differ."""

    summary: Summary
    runs: list[float]  # output tokens a second of each
    spread: float
    roofline_share: float | None

    def rows(self) -> Iterator[tuple[str, str]]:
        """The rows of its card."""
        yield from summary_rows(self.summary)
        yield "runs, spread", f"{len(self.runs)}, {percent(self.spread)}"
        yield "share of the roofline", percent(self.roofline_share)

    def as_json(self) -> dict[str, object]:
        """Its part of the last line."""
        return {
            **asdict(self.summary),
            "runs": self.runs,
            "spread": round(self.spread, 4),
            "roofline_share": self.roofline_share and round(self.roofline_share, 4),
        }


def fold(runs: list[Measured], spec: BackendSpec, ceiling: Ceiling | None) -> Result:
    """Summarise runs of one workload."""
    summaries = [summarise(run.records, run.duration_s) for run in runs]
    rates = [summary.output_tokens_per_s for summary in summaries]
    median = median_index(rates)
    run = runs[median]
    share = roofline_share(run.steps, spec, ceiling, run.duration_s) if ceiling else None
    return Result(summaries[median], rates, spread(rates), share)


def comparison_rows(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """What a comparison adds to the card."""
    yield comparison.name, f"{comparison.output_tokens_per_s:,.1f} tokens/s"
    yield "ours over theirs", f"{comparison.ratio:.2f}"


def run_workload(options: argparse.Namespace, settings: Settings) -> int:
    """Measure a workload, show the card, print the JSON line; 1 when a request failed."""
    made_up = settings.backend.model.load_format == "dummy"
    with opened(settings) as llm:
        spec, workload = llm.spec, choose(options, llm)
        order = options.compare and order_for(workload, spec, made_up, options.repeat)
        concurrency = min(options.concurrency or len(workload.jobs), len(workload.jobs))
        runs = measure(llm, workload, concurrency, options.repeat)
        ceiling = ceiling_of(spec)
    result = fold(runs, spec, ceiling)
    rows = list(result.rows())
    report = {
        "workload": workload.name,
        "concurrency": concurrency,
        **result.as_json(),
        **facts(spec, ceiling),
    }
    if order:
        comparison = compare(options.compare, order, result.summary.output_tokens_per_s)
        rows += comparison_rows(comparison)
        report["compare"] = asdict(comparison)
    show(f"{workload.name}: {spec.model}, {report['device']}", ("", "median run"), rows)
    finish(report)
    return 1 if result.summary.failed else 0


def run_decode_step(options: argparse.Namespace, settings: Settings) -> int:
    """Measure single decode steps, show the card, print the JSON line."""
    with opened(settings) as llm:
        spec = llm.spec
        quiet = list(measure_batches(llm.engine, spec, options.repeat))
        ceiling = ceiling_of(spec)
    steps = [decode_step(batch, works, spec, ceiling) for batch, works in quiet]
    show(
        f"decode step at context {CONTEXT}: {spec.model}, {spec.device}",
        ("batch", "step, p50 / p90 / p99", "floor", "share of the roofline"),
        [step_row(step) for step in steps],
    )
    finish({"decode_steps": [asdict(step) for step in steps], **facts(spec, ceiling)})
    return 0


def step_row(step: DecodeStep) -> tuple[str, ...]:
    """A row of the card."""
    floor = "-" if step.floor_ms is None else f"{step.floor_ms:,.2f} ms"
    return str(step.batch), milliseconds(step.step_ms), floor, percent(step.roofline_share)


def main() -> int:
    """Measure what the command line asks for."""
    options = parse()
    settings = read_settings()
    start_log(settings.log_level)
    return (run_decode_step if options.decode_step else run_workload)(options, settings)


if __name__ == "__main__":
    run_script(main)
