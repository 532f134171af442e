"""What a scrape reads, through the parsers of the library that writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from api.metrics import open_registry, render
from backend.interface import Finish, Load, SamplingParams, StepOutput, Submission
from engine.live_request import LiveRequest
from engine.multi_device import EnginePool, ReplicaStatus
from engine.statistics import Distribution, Statistics
from ipc.messages import Step

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
LOAD = Load(
    running=1,
    waiting=0,
    pages_total=100,
    pages_free=60,
    pages_cached=30,
    pages_leased=10,
    preemptions=2,
    steps=7,
)
TYPES = {  # of every name that section 6 of the surface has
    "requests_running": "gauge",
    "requests_waiting": "gauge",
    "requests_total": "counter",
    "prompt_tokens_total": "counter",
    "cached_tokens_total": "counter",
    "generated_tokens_total": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "queue_time_seconds": "histogram",
    "kv_pages_total": "gauge",
    "kv_pages_free": "gauge",
    "kv_pages_cached": "gauge",
    "kv_pages_leased": "gauge",
    "preemptions_total": "counter",
    "rejected_total": "counter",
    "step_seconds": "histogram",
    "step_tokens": "histogram",
    "engine_restarts_total": "counter",
    "startup_phase_seconds": "gauge",
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Pool:
    """What a scrape looks at, without an engine."""

    statistics: Statistics = field(default_factory=lambda: Statistics(10))
    running: int = 0
    waiting: int = 0
    replicas: list[ReplicaStatus] = field(default_factory=list)


def replica(index: int, load: Load | None) -> ReplicaStatus:
    return ReplicaStatus(index, "cpu", "ready", 1, 0, 4711, load, 1.0)


def answer(statistics: Statistics, arrival: float, *tokens_at: float) -> None:
    """One answer from its arrival to its last token."""
    submission = Submission("a", (1, 2, 3), SamplingParams(), seed=0, arrival=arrival)
    request = LiveRequest(submission, "a", "", lambda request: None, cached=2, placed=arrival + 0.1)
    statistics.accepted(request)
    statistics.placed(request)
    for at in tokens_at:
        statistics.received(request, 1, at)
        request.received.append(1)
        request.last_token = at
        request.first_token = tokens_at[0]
    request.finish, request.ended = Finish("length"), tokens_at[-1]
    statistics.finished(request)


def after_a_history() -> Pool:
    pool = Pool(running=3, waiting=5, replicas=[replica(0, LOAD), replica(1, None)])
    seen = pool.statistics
    answer(seen, 0.0, 0.25, 0.5, 1.0)
    answer(seen, 1.0, 2.0)
    seen.rejected("queue_full")
    seen.rejected("queue_full")
    seen.rejected('said "no"\n')
    seen.step(0, Step.of(StepOutput(step_tokens=33, step_seconds=0.012), LOAD))
    seen.restarted(0)
    seen.step(0, Step.of(StepOutput(step_tokens=5, step_seconds=0.008), LOAD))
    seen.phase(1, "load weights", 2.5)
    return pool


def scrape(pool: Pool, accept: str | None = None) -> list[Metric]:
    body, content_type = render(open_registry(cast(EnginePool, pool)), accept)
    parse = parse_openmetrics if content_type.startswith("application/") else parse_text
    return list(parse(body.decode()))


def samples(metrics: Iterable[Metric]) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for metric in metrics
        for sample in metric.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"minisgl_{name}", frozenset(labels.items())]


def test_every_name_is_there_with_its_type_before_anything_has_happened() -> None:
    body, _ = render(open_registry(cast(EnginePool, Pool())), None)
    types = dict(re.findall(r"^# TYPE minisgl_(\w+) (\w+)$", body.decode(), re.MULTILINE))
    assert types == TYPES


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
def test_each_number_is_that_of_the_history(accept: str | None) -> None:
    found = samples(scrape(after_a_history(), accept))
    assert value(found, "requests_running") == 3
    assert value(found, "requests_waiting") == 5
    assert value(found, "requests_total", finish_reason="length") == 2
    assert value(found, "requests_total", finish_reason="error") == 0
    assert value(found, "rejected_total", reason="queue_full") == 2
    assert value(found, "rejected_total", reason='said "no"\n') == 1
    assert value(found, "prompt_tokens_total") == 6
    assert value(found, "cached_tokens_total") == 4
    assert value(found, "generated_tokens_total") == 4
    assert value(found, "preemptions_total") == 4
    assert value(found, "engine_restarts_total") == 1
    assert value(found, "startup_phase_seconds", phase="load weights", replica="1") == 2.5
    assert value(found, "kv_pages_total", replica="0") == 100
    assert value(found, "kv_pages_free", replica="0") == 60
    assert value(found, "kv_pages_cached", replica="0") == 30
    assert value(found, "kv_pages_leased", replica="0") == 10
    for name, count, total in [
        ("time_to_first_token_seconds", 2, 1.25),
        ("inter_token_latency_seconds", 2, 0.75),
        ("e2e_request_latency_seconds", 2, 2.0),
        ("queue_time_seconds", 2, 0.2),
        ("step_seconds", 2, 0.02),
        ("step_tokens", 2, 38),
    ]:
        assert value(found, f"{name}_count") == count
        assert value(found, f"{name}_sum") == pytest.approx(total)


def test_a_replica_that_has_not_reported_shows_no_pages() -> None:
    found = samples(scrape(after_a_history()))
    assert ("minisgl_kv_pages_free", frozenset({("replica", "1")})) not in found


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
def test_buckets_are_cumulative_and_agree_with_the_count(accept: str | None) -> None:
    histograms = [each for each in scrape(after_a_history(), accept) if each.type == "histogram"]
    assert len(histograms) == list(TYPES.values()).count("histogram")
    for metric in histograms:
        buckets = [each for each in metric.samples if each.name.endswith("_bucket")]
        bounds = [float(each.labels["le"]) for each in buckets]
        counts = [each.value for each in buckets]
        (count,) = (each.value for each in metric.samples if each.name.endswith("_count"))
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == float("inf")
        assert counts == sorted(counts)
        assert counts[-1] == count > 0


def test_a_bucket_holds_what_lies_at_or_below_its_bound() -> None:
    pool = Pool()
    pool.statistics.step_tokens = Distribution((1.0, 8.0))
    for tokens in (1, 2, 8, 9):
        pool.statistics.step_tokens.add(tokens)
    found = samples(scrape(pool))
    assert [value(found, "step_tokens_bucket", le=le) for le in ("1.0", "8.0", "+Inf")] == [1, 3, 4]


def test_no_counter_goes_down_when_an_engine_is_replaced() -> None:
    def totals(pool: Pool) -> Samples:
        kinds = ("counter", "histogram")
        return samples(each for each in scrape(pool) if each.type in kinds and is_ours(each))

    pool = after_a_history()
    before = totals(pool)
    pool.statistics.restarted(0)
    pool.replicas = [replica(0, None)]
    after = totals(pool)
    assert all(after[key] >= before[key] for key in before)
    assert value(after, "preemptions_total") == value(before, "preemptions_total")
    fresh = Load(0, 0, 100, 100, 0, 0, preemptions=0, steps=0)
    pool.statistics.step(0, Step.of(StepOutput(), fresh))
    assert value(totals(pool), "preemptions_total") == value(before, "preemptions_total")


def is_ours(metric: Metric) -> bool:
    return metric.name.startswith("minisgl_")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_process_is_shown_too() -> None:
    assert samples(scrape(Pool()))["process_resident_memory_bytes", frozenset()] > 0


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "text/plain"),
        ("*/*", "text/plain"),
        ("text/html", "text/plain"),
        (OPENMETRICS, "application/openmetrics-text"),
        (f"{OPENMETRICS},text/plain;version=0.0.4;q=0.5", "application/openmetrics-text"),
        ("application/openmetrics-text; version=abc", "text/plain"),
        ("text/plain; version=1e999", "text/plain"),
        (";;==,", "text/plain"),
    ],
)
def test_the_accept_header_chooses_the_format(accept: str | None, content_type: str) -> None:
    body, found = render(open_registry(cast(EnginePool, Pool())), accept)
    assert found.startswith(content_type)
    assert body.endswith(b"# EOF\n") == content_type.startswith("application/")


def test_servers_of_one_process_keep_their_numbers_apart() -> None:
    first, second = Pool(running=1), Pool(running=2)
    registries = [open_registry(cast(EnginePool, pool)) for pool in (first, second)]
    running = [each.get_sample_value("minisgl_requests_running") for each in registries]
    assert running == [1, 2]
