"""Batch jobs: `python -m api.batch input.jsonl -o output.jsonl`, in OpenAI's file format, no port.

The flags of the server hold, but for keys and the bound of its queue. The exit code is 0 when every
line has its answer, 1 when some answers are errors, 2 when there is no job, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from api.batch_file import BatchFileError, Output, read_lines
from api.batch_run import Job
from api.lifecycle import ENDS, Lifecycle
from api.server import build_api
from backend.interface import EngineError
from config import ConfigError, Settings, read_settings
from engine.multi_device import EnginePool
from engine.statistics import Statistics

ANSWERED, SOME_FAILED, NO_JOB, INTERRUPTED = 0, 1, 2, 130
ROWS_AHEAD = 2  # requests under way for each row of the engines: none of them waits for us
REFRESH_S = 0.25  # of the progress bar


def main() -> int:
    """Run the job of the command line. Returns the exit code."""
    options = _parse()
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        return asyncio.run(_until_signalled(options, console))
    except (BatchFileError, ConfigError, EngineError) as error:
        console.print(str(error))
        return NO_JOB


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m api.batch", description="Answer a batch file.")
    parser.add_argument("input", type=Path, help="requests, one JSON object a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="answers, likewise")
    parser.add_argument(
        "--concurrency", type=_positive, metavar="N", help="requests under way at a time"
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


async def _until_signalled(options: argparse.Namespace, console: Console) -> int:
    """The job, ended by the first SIGINT or SIGTERM."""
    job = asyncio.ensure_future(_run(options, console))
    with _on_signals(job):
        try:
            return await job
        except asyncio.CancelledError:
            console.print(
                f"interrupted: what is answered is in {options.output}; "
                "the same command goes on from there"
            )
            return INTERRUPTED


@contextmanager
def _on_signals(job: asyncio.Future[int]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in ENDS:
        loop.add_signal_handler(number, job.cancel)
    try:
        yield
    finally:
        for number in ENDS:
            loop.remove_signal_handler(number)


async def _run(options: argparse.Namespace, console: Console) -> int:
    """The whole input is looked at before an engine is started."""
    settings = _alone(read_settings())
    expected = {line.custom_id for line in read_lines(options.input)}
    with closing(Output(options.output, expected)) as output:
        if before := len(output.answered):
            console.print(f"{before:,} of {len(expected):,} lines are answered already")
        if before < len(expected):
            await _answer(options, settings, output, len(expected), console)
        if output.failed:
            console.print(f"{output.failed:,} of {len(expected):,} answers are errors")
        return SOME_FAILED if output.failed else ANSWERED


def _alone(settings: Settings) -> Settings:
    """For requests that are all our own: no key keeps anybody out, and all may wait."""
    return settings.model_copy(
        update={
            "server": settings.server.model_copy(update={"api_key": None}),
            "queue": settings.queue.model_copy(update={"max_queued": 0}),
        }
    )


async def _answer(
    options: argparse.Namespace, settings: Settings, output: Output, total: int, console: Console
) -> None:
    async with _engines(settings) as life:
        job = Job(build_api(settings, life), life.pool, output)
        with _progress(console, output, total, life.statistics):
            concurrency = options.concurrency or _all_rows(life.pool)
            await job.run(read_lines(options.input), concurrency)


@asynccontextmanager
async def _engines(settings: Settings) -> AsyncIterator[Lifecycle]:
    """Those of a server, without its port, its control plane and its manner of ending."""
    life = Lifecycle(settings)
    try:
        await life.pool.start()
        await life.service.wait_for_model()
        yield life
    finally:
        await life.stop()


def _all_rows(pool: EnginePool) -> int:
    return ROWS_AHEAD * pool.spec.max_running * len(pool.replicas)


@contextmanager
def _progress(
    console: Console, output: Output, total: int, statistics: Statistics
) -> Iterator[None]:
    """A bar on a terminal, drawn by the event loop; elsewhere its last state."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f} a second"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=total, tokens=0, rate=0.0)
        start = time.monotonic()

        def show() -> None:
            tokens = statistics.generated_tokens
            rate = tokens / (time.monotonic() - start)
            done = len(output.answered)
            progress.update(task, completed=done, tokens=tokens, rate=rate, refresh=True)

        ticker = asyncio.ensure_future(_every(REFRESH_S, show))
        try:
            yield
        finally:
            ticker.cancel()
            show()


async def _every(seconds: float, act: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(seconds)
        act()


if __name__ == "__main__":
    sys.exit(main())
