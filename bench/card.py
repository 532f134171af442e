"""How a result is shown: a readable card, then one line of JSON, the last of stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.summary import Percentiles, Summary


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table to stdout; the first column is what the others are about."""
    table = Table(title=Text(title), title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def finish(report: Mapping[str, object]) -> None:
    """Print the last line."""
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def summary_rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """The rows of a card for one run."""
    yield "output tokens/s", f"{summary.output_tokens_per_s:,.1f}"
    yield "total tokens/s", f"{summary.total_tokens_per_s:,.1f}"
    yield "requests, failed", f"{summary.requests:,}, {summary.failed:,}"
    yield (
        "tokens in (cached), out",
        f"{summary.prompt_tokens:,} ({summary.cached_tokens:,}), {summary.output_tokens:,}",
    )
    yield "duration", f"{summary.duration_s:,.2f} s"
    yield "first token, p50 / p90 / p99", milliseconds(summary.ttft_ms)
    yield "between tokens", milliseconds(summary.itl_ms)
    yield "whole answer", milliseconds(summary.e2e_ms)


def milliseconds(times: Percentiles, digits: int = 1) -> str:
    """The three percentiles in a row."""
    values = (times.p50, times.p90, times.p99)
    return " / ".join("-" if value is None else f"{value:,.{digits}f}" for value in values) + " ms"


def percent(share: float | None) -> str:
    """A share for a reader."""
    return "-" if share is None else f"{100 * share:.1f} %"
