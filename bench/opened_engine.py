"""An engine in this process as benchmarks measure it: prepared, with an engine's collector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from config import Settings
from engine.collector import settle_collector

if TYPE_CHECKING:
    from engine.llm import LLM


@contextmanager
def opened(settings: Settings) -> Iterator[LLM]:
    """The engine of these settings, prepared, with the collector as an engine process has it."""
    from engine.llm import LLM  # after the flags, so that a wrong one is told at once

    with LLM(settings) as llm:
        settle_collector()
        llm.prepare()
        yield llm
