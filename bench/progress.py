"""A bar on stderr that takes no time from what it shows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

REDRAW_S = 0.5


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more are done.

    It redraws from within, twice a second: a bar with a thread of its own would compete with the
    engine. Where stderr is not a terminal, nothing is shown.
    """
    console = Console(stderr=True)
    bar = Progress(
        console=console, auto_refresh=False, transient=True, disable=not sys.stderr.isatty()
    )
    task = bar.add_task(what, total=total)
    drawn = time.monotonic()

    def advance(count: int) -> None:
        nonlocal drawn
        bar.advance(task, count)
        if time.monotonic() - drawn > REDRAW_S:
            bar.refresh()
            drawn = time.monotonic()

    with bar:
        yield advance
