"""The server under load, over HTTP: time to first token, between tokens, throughput, goodput.

Without --base-url it starts a server with this environment (such as MODEL_LOCAL_DIR) and ends it
afterwards. A closed loop (--concurrency) has users, each of whom asks again when answered. An open
loop (--request-rate) has visitors at random times, whether or not the server keeps up; their
latencies count from the moment they meant to ask. Before the first run short requests warm the
server up; before each run its prefix cache is emptied.

The first token is the first frame with text. Times between tokens are times between frames, each of
which may bring several tokens; --slo-itl-ms judges a request's average over its tokens. Tokens are
counted by the server. Latencies are those of requests that did not fail. One that fails is shown
under its cause, and makes the exit code 1.

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import uvloop

from backend.interface import RequestRefused, Unavailable
from bench.answer_stream import ENDPOINTS
from bench.asks import (
    Manner,
    Source,
    random_source,
    read_prompts,
    text_source,
    workload_source,
)
from bench.card import finish, show
from bench.curve import draw_curve
from bench.http_connection import Address, key_of
from bench.http_load import Asker, ClosedLoop, Load, LoadRun, OpenLoop
from bench.load_report import SWEEP_HEADER, Result, fold
from bench.progress import progress_bar
from bench.script import Parser, amount, counts, positive, run_script, start_log
from bench.server_facts import ServerFacts, ask_facts, flush
from bench.server_process import own_server
from bench.summary import Objective
from bench.workloads import WORKLOADS
from config import read_settings

logger = logging.getLogger(__name__)

REQUESTS = 64  # of a run
NEW_TOKENS = 128  # of an answer
PROMPT_TOKENS = 128  # about so many in a random prompt
TIMEOUT_S = 600.0
WARM_UP = Manner(new_tokens=4, temperature=0.0, seed=0, ignore_eos=True)
WARM_PROMPT = 32  # tokens


def parse() -> argparse.Namespace:
    """The command line. What contradicts itself is an error."""
    parser = Parser(
        prog="server_bench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_requests(parser)
    add_load(parser)
    parser.add_argument("--base-url", metavar="URL", help="of a server that runs already")
    parser.add_argument("--api-key", metavar="KEY", help="default: the first one of API_KEY")
    options = parser.parse_args()
    if options.workload:
        check_workload(parser, options)
    options.endpoint = options.endpoint or ("completions" if options.workload else "generate")
    if options.plot and not options.sweep:
        parser.error("--plot draws a --sweep")
    if options.plot and not Path(options.plot).parent.is_dir():
        parser.error(f"--plot {options.plot}: there is no such folder")
    return options


def add_requests(parser: Parser) -> None:
    """Options about what is asked for."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("prompt", nargs="?", help="one prompt, --num-requests times")
    what.add_argument("--prompts", metavar="FILE", help='one a line; .jsonl: "prompt" of each line')
    what.add_argument(
        "--prompt-tokens",
        type=positive,
        metavar="N",
        help=f"random prompts of about N tokens, new ones in each run (default: {PROMPT_TOKENS})",
    )
    what.add_argument("--workload", choices=WORKLOADS, help="a fixed set of requests, id by id")
    for flag, kind, meaning in (
        ("--num-requests", positive, f"of a run; {REQUESTS}, or all of --prompts or --workload"),
        ("--max-new-tokens", positive, f"of an answer; {NEW_TOKENS} if not given"),
        ("--temperature", float, "0 (greedy) if not given"),
    ):
        parser.add_argument(flag, type=kind, metavar="N", help=meaning)
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of all that is drawn")
    parser.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="answers have their full length (of random prompts they do if not told)",
    )
    parser.add_argument(
        "--endpoint", choices=ENDPOINTS, help="generate if not given, completions for a workload"
    )


def add_load(parser: Parser) -> None:
    """Options about how much at once, how often, and what is expected of the answers."""
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=positive, metavar="N", help="users; all if not given")
    load.add_argument("--request-rate", type=amount, metavar="R", help="visitors a second")
    load.add_argument("--sweep", type=counts, metavar="N,N", help="one concurrency after another")
    parser.add_argument("--plot", metavar="FILE", help="draw latency over throughput of the sweep")
    parser.add_argument(
        "--repeat", type=positive, metavar="N", default=1, help="runs; the median one is shown"
    )
    for flag, default, meaning in (
        ("--timeout", TIMEOUT_S, f"a request that takes longer, in seconds ({TIMEOUT_S:g}), fails"),
        ("--slo-ttft-ms", None, "longest time to the first token of a good request"),
        ("--slo-itl-ms", None, "longest time between its tokens"),
    ):
        parser.add_argument(flag, type=amount, metavar="T", default=default, help=meaning)


def check_workload(parser: Parser, options: argparse.Namespace) -> None:
    """A workload says by itself what its requests are."""
    if options.endpoint not in (None, "completions"):
        parser.error("--workload has token ids, which only --endpoint completions takes here")
    for name in ("max_new_tokens", "temperature", "ignore_eos"):
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} goes with a prompt: a workload has its own")


def source_of(options: argparse.Namespace) -> Source:
    """What is asked for. Raises RequestRefused."""
    count = options.num_requests
    if options.workload:
        return workload_source(options.workload, count, options.seed)
    manner = Manner(
        options.max_new_tokens or NEW_TOKENS,
        options.temperature or 0.0,
        options.seed,
        bool(options.ignore_eos),
    )
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
        return text_source(options.prompts, prompts, count or len(prompts), manner)
    if options.prompt is not None:
        return text_source("one prompt", [options.prompt], count or REQUESTS, manner)
    if options.ignore_eos is None:
        manner = replace(manner, ignore_eos=True)
    return random_source(count or REQUESTS, options.prompt_tokens or PROMPT_TOKENS, manner)


def loads_of(options: argparse.Namespace, count: int) -> list[Load]:
    """How `count` requests are spread, run by run. Raises RequestRefused."""
    if options.request_rate:
        return [OpenLoop(options.request_rate, options.seed)]
    users = options.sweep or (options.concurrency or count,)
    if max(users) > count:
        raise RequestRefused(
            f"{max(users)} requests in flight were asked for, and {count} in all: "
            "raise --num-requests",
            "num_requests",
        )
    return [ClosedLoop(number) for number in users]


def server_of(options: argparse.Namespace) -> AbstractContextManager[str]:
    """The URL of the server that was named, or else of one for the time of the block."""
    return nullcontext(options.base_url.rstrip("/")) if options.base_url else own_server()


def measure(
    asker: Asker, source: Source, loads: Sequence[Load], repeat: int, vocabulary: int
) -> list[list[LoadRun]]:
    """Warm up, then run each load `repeat` times, from an empty cache."""
    users = max(load.at_once for load in loads)
    warm_up = random_source(users, WARM_PROMPT, WARM_UP).draw("warm-up", vocabulary)
    uvloop.run(ClosedLoop(users).run(asker, warm_up))
    with progress_bar("requests", len(loads) * repeat * source.count) as advance:
        asker = replace(asker, progress=advance)

        def run(load: Load, name: str) -> LoadRun:
            try:
                flush(asker.address)
            except Unavailable as error:  # the run will show what is wrong with the server
                logger.warning("the prefix cache was not emptied: %s", error)
            return uvloop.run(load.run(asker, source.draw(name, vocabulary)))

        return [
            [run(load, f"{number}-{turn}") for turn in range(repeat)]
            for number, load in enumerate(loads)
        ]


def show_results(title: str, results: Sequence[Result]) -> None:
    """Print a card for one load, or a table for several."""
    if len(results) == 1:
        show(title, ("", "median run"), results[0].rows())
        return
    show(title, SWEEP_HEADER, [result.sweep_row() for result in results])
    failures = [(each.label, *row) for each in results for row in each.failure_rows()]
    if failures:
        show("failures", ("load", "cause", "requests"), failures)


def report(
    options: argparse.Namespace, source: Source, results: Sequence[Result], facts: ServerFacts
) -> dict[str, object]:
    """The last line: of a sweep the last load, and all of them under "sweep"."""
    sweep = {"sweep": [result.as_json() for result in results]} if options.sweep else {}
    return {
        "endpoint": options.endpoint,
        "workload": source.name,
        **results[-1].as_json(),
        **sweep,
        **facts.as_json(),
    }


def main() -> int:
    """Measure what the command line asks for; 1 when a request failed."""
    options, settings = parse(), read_settings()
    start_log(settings.log_level)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    source = source_of(options)
    loads = loads_of(options, source.count)
    endpoint, key = ENDPOINTS[options.endpoint], key_of(options.api_key, settings.server)
    with server_of(options) as url:
        address = Address(url, key)
        facts = ask_facts(address)
        asker = Asker(address, endpoint, facts.model, options.timeout)
        runs = measure(asker, source, loads, options.repeat, facts.vocabulary)
    objective = Objective(options.slo_ttft_ms, options.slo_itl_ms)
    results = [fold(load, each, objective) for load, each in zip(loads, runs, strict=True)]
    title = f"{source.name} at {endpoint.path}: {facts.model}, {facts.device or url}"
    show_results(title, results)
    if options.plot:
        points = [result.as_point() for result in results]
        Path(options.plot).write_text(draw_curve(title, points), encoding="utf-8")
    finish(report(options, source, results, facts))
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    run_script(main)
