"""The reference workload through a server of our own: 256 streams, every token as text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backend.interface import BackendFailed
from backend.tokenizer import TOKENIZER_FILE
from bench.answer_stream import ENDPOINTS
from bench.asks import workload_source
from bench.card import show
from bench.http_connection import Address
from bench.http_load import Asker, ClosedLoop
from bench.load_report import fold
from bench.server_facts import ask_facts
from bench.server_process import own_server
from bench.summary import Objective
from config import Settings
from server_bench import TIMEOUT_S, measure

STREAMS = 256
RUNS = 2
IDLE_S = 8.0  # in which the engine prepares what it does in idle moments
ENDPOINT = "completions"  # the prompts are token ids


def serve(settings: Settings) -> Iterator[Mapping[str, Any]]:
    """Start a server with this environment and load it. Raises BackendFailed."""
    source, load = workload_source("reference", None, seed=0), ClosedLoop(STREAMS)
    with own_server() as url:
        address = Address(url)
        facts = ask_facts(address)
        asker = Asker(address, ENDPOINTS[ENDPOINT], facts.model, TIMEOUT_S)
        measure(asker, source, [load], 1, facts.vocabulary)  # as offline: the first one warms up
        time.sleep(IDLE_S)
        (runs,) = measure(asker, source, [load], RUNS, facts.vocabulary)
    result = fold(load, runs, Objective())
    text = has_tokenizer(settings)
    show(
        f"reference at {ENDPOINTS[ENDPOINT].path}: {facts.model}",
        ("", "median run"),
        [*result.rows(), ("tokenizer", "yes" if text else "none: nothing is detokenized")],
    )
    if result.failures:
        raise BackendFailed(f"requests failed: {next(iter(result.failures))}")
    yield {
        "http_output_tokens_per_s": result.runs,
        "http_tokenizer": text,
        "http": result.as_json(),
    }


def has_tokenizer(settings: Settings) -> bool:
    """Whether the model's folder has a vocabulary, so that there is text to make."""
    folder = settings.backend.model.local_dir
    return folder is not None and (Path(folder) / TOKENIZER_FILE).is_file()
