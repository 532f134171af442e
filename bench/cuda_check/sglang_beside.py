"""SGLang through our backend beside SGLang driven directly, and our native backend beside both.

One engine is driven both ways, in turns: so nothing is compared but what stands between it and us.
Driven directly it is asked by its own `async_generate` on its own event loop, all requests at once,
once for whole answers, as its own offline benchmark does, and once for streams of ids, as we do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

from backend.interface import BackendFailed
from backend.sglang.backend import SglangBackend
from backend.sglang.bridge import Bridge
from backend.sglang.runtime import Engine as SglangEngine
from bench.card import show
from bench.cuda_check.speed import about, check, run_reference
from bench.drive import Driver
from bench.opened_engine import opened
from bench.summary import percentile
from bench.workloads import Job, Workload, reference
from config import Settings
from engine.collector import settle_collector
from engine.engine import Engine
from engine.opening import open_backend

RUNS = 3
DIRECT_S = 120.0  # that SGLang has for one run
RATE = "output_tokens_per_s"

Results = Mapping[str, Any]


def beside_direct(settings: Settings) -> Iterator[Results]:
    """With BACKEND_IMPL=sglang: the reference workload, in turns. Raises BackendFailed."""
    begun = time.monotonic()
    backend = cast(SglangBackend, open_backend(settings.backend))
    engine = Engine(backend, settings.queue)
    try:
        settle_collector()
        yield {"sglang_start_s": round(time.monotonic() - begun, 1)}
        yield {"sglang": about(backend.spec, None)}
        workload = reference(backend.spec.vocabulary)
        ways: dict[str, Callable[[], float]] = {
            f"sglang_direct_{RATE}": partial(direct, backend.bridge, workload, streamed=False),
            f"sglang_{RATE}": partial(ours, engine, workload),
            f"sglang_direct_streamed_{RATE}": partial(direct, backend.bridge, workload, True),
        }
        yield from in_turns(ways, engine, workload)
    finally:
        engine.close()


def in_turns(
    ways: Mapping[str, Callable[[], float]], engine: Engine, workload: Workload
) -> Iterator[Results]:
    """Tokens a second of each way, in turns and from an empty cache. The first is not measured."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(RUNS + 1):
        for name, run in ways.items():
            engine.flush()
            rate = round(workload.new_tokens / run(), 2)
            if turn:
                rates[name].append(rate)
                yield {name: [rate]}
    rows = [(name, f"{percentile(found, 50):,.0f}", f"{found}") for name, found in rates.items()]
    show("the reference workload, tokens/s", ("", "median", "runs"), rows)


def ours(engine: Engine, workload: Workload) -> float:
    """Seconds of a run through our engine."""
    measured = Driver(engine, workload, len(workload.jobs), f"{time.monotonic_ns()}").run()
    check(measured.records)
    return measured.duration_s


def direct(bridge: Bridge, workload: Workload, streamed: bool) -> float:
    """Seconds of a run by SGLang's own call. Raises BackendFailed when tokens are missing."""
    begun = time.perf_counter()
    count = bridge.call(partial(generate_all, workload=workload, streamed=streamed), DIRECT_S)
    seconds = time.perf_counter() - begun
    if count != workload.new_tokens:
        raise BackendFailed(f"SGLang gave {count} tokens of {workload.new_tokens}")
    return seconds


async def generate_all(engine: SglangEngine, workload: Workload, streamed: bool) -> int:
    """All requests at once. Returns the tokens that came."""
    asked = (generate(engine, job, workload.temperature, streamed) for job in workload.jobs)
    return sum(await asyncio.gather(*asked))


async def generate(engine: SglangEngine, job: Job, temperature: float, streamed: bool) -> int:
    """One request. Returns its tokens."""
    sampling = {
        "temperature": temperature, "max_new_tokens": job.new_tokens, "ignore_eos": True,
    }  # fmt: skip
    answer = await engine.async_generate(
        input_ids=list(job.prompt), sampling_params=sampling, stream=streamed
    )
    if not streamed:
        return len(answer["output_ids"])
    count = 0
    async for piece in answer:
        count += len(piece["output_ids"])
    return count


def native(settings: Settings) -> Iterator[Results]:
    """The same work through our own model code, with the attention that the flags name."""
    with opened(settings) as llm:
        found = run_reference(llm, RUNS, None).runs
        attention = settings.backend.device.attention
        yield {f"native_{attention}_attention": llm.spec.attention}
        yield {f"native_{attention}_{RATE}": found}
