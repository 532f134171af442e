"""The numbers of this server as Prometheus reads them: names and meanings; nothing is counted here.

The pool and its statistics hold the numbers, and they are copied out at each scrape. A scrape runs
on the event loop, where they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from backend.interface import Load
from engine.multi_device import EnginePool
from engine.statistics import Distribution, Statistics

PREFIX = "minisgl_"

Owner = TypeVar("Owner")
Value = TypeVar("Value")
# name -> (where the value stands, what it means)
Table: TypeAlias = dict[str, tuple[Callable[[Owner], Value], str]]

POOL: Table[EnginePool, int] = {
    "requests_running": (lambda pool: pool.running, "Requests given to engines and not ended."),
    "requests_waiting": (lambda pool: pool.waiting, "Requests that no engine has yet."),
}
PAGES: Table[Load, int] = {  # by replica
    "kv_pages_total": (lambda load: load.pages_total, "Pages of the KV cache."),
    "kv_pages_free": (lambda load: load.pages_free, "Pages that hold nothing."),
    "kv_pages_cached": (lambda load: load.pages_cached, "Pages of cached prefixes."),
    "kv_pages_leased": (lambda load: load.pages_leased, "Pages held by running sequences."),
}
COUNTERS: Table[Statistics, int] = {
    "prompt_tokens_total": (
        lambda seen: seen.prompt_tokens,
        "Prompt tokens of ended requests that had an engine.",
    ),
    "cached_tokens_total": (
        lambda seen: seen.cached_tokens,
        "Prompt tokens that the cache answered.",
    ),
    "generated_tokens_total": (lambda seen: seen.generated_tokens, "Tokens of answers."),
    "preemptions_total": (lambda seen: seen.preemptions, "Sequences that yielded their pages."),
    "engine_restarts_total": (lambda seen: seen.restarts, "Engines that were lost."),
}
HISTOGRAMS: Table[Statistics, Distribution] = {
    "time_to_first_token_seconds": (
        lambda seen: seen.time_to_first_token,
        "From the arrival of a request to its first token.",
    ),
    "inter_token_latency_seconds": (
        lambda seen: seen.inter_token,
        "Between two tokens of an answer.",
    ),
    "e2e_request_latency_seconds": (
        lambda seen: seen.end_to_end,
        "From the arrival of a request to its own end (stop, length).",
    ),
    "queue_time_seconds": (
        lambda seen: seen.queue_time,
        "From the arrival of a request until an engine is given it.",
    ),
    "step_seconds": (lambda seen: seen.step_seconds, "From launch to settlement of a step."),
    "step_tokens": (lambda seen: seen.step_tokens, "Positions that a step computed."),
}


def open_registry(pool: EnginePool) -> CollectorRegistry:
    """All that `/metrics` shows: the pool's numbers, and CPU, memory and files of this process."""
    registry = CollectorRegistry()
    registry.register(PoolCollector(pool))
    ProcessCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry, accept: str | None) -> tuple[bytes, str]:
    """The body and content type of `/metrics`, in the format that an Accept header asks for.

    Called on the event loop.
    """
    try:
        encode, content_type = choose_encoder(accept or "")
    except TypeError:  # the header asks for a version that is no number
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


class PoolCollector:
    """Copies the numbers of one pool at each scrape."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """Every metric of this server."""
        pool, seen = self._pool, self._pool.statistics
        for name, (read, text) in POOL.items():
            yield GaugeMetricFamily(PREFIX + name, text, read(pool))
        yield _counters("requests_total", "Requests that ended.", "finish_reason", seen.requests)
        yield _counters("rejected_total", "Requests not accepted.", "reason", seen.rejections)
        for name, (count, text) in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, count(seen))
        for name, (distribution, text) in HISTOGRAMS.items():
            yield _histogram(name, text, distribution(seen))
        yield from self._pages()
        yield self._phases()

    def _pages(self) -> Iterator[Metric]:
        loads = {str(each.index): each.load for each in self._pool.replicas if each.load}
        for name, (count, text) in PAGES.items():
            pages = GaugeMetricFamily(PREFIX + name, text, labels=["replica"])
            for replica, load in loads.items():
                pages.add_metric([replica], count(load))
            yield pages

    def _phases(self) -> Metric:
        seconds = GaugeMetricFamily(
            PREFIX + "startup_phase_seconds",
            "What each phase of an engine's last start took.",
            labels=["phase", "replica"],
        )
        for replica, phases in self._pool.statistics.phases.items():
            for phase, took in phases.items():
                seconds.add_metric([phase, str(replica)], took)
        return seconds


def _counters(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    counters = CounterMetricFamily(PREFIX + name, text, labels=[label])
    for key, value in values.items():
        counters.add_metric([key], value)
    return counters


def _histogram(name: str, text: str, values: Distribution) -> Metric:
    bounds = [*map(str, values.bounds), "+Inf"]
    buckets = list(zip(bounds, values.cumulative(), strict=True))
    return HistogramMetricFamily(PREFIX + name, text, buckets, values.sum)
