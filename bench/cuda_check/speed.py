"""The engine without HTTP: the reference workload, one request alone, a long prompt, single steps.

Nothing is compared with what another process measured: ceilings are those of the same process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from backend.interface import BackendFailed, BackendSpec
from bench.card import show
from bench.cuda_check.kernels import kernels_of_a_step
from bench.cuda_check.steps import HEADER, steps_beside_floor
from bench.drive import Driver
from bench.opened_engine import opened
from bench.roofline import Ceiling
from bench.summary import Record, percentile
from bench.workloads import Workload, alike, reference
from config import Settings
from local_bench import Result, ceiling_of, facts, fold, measure

if TYPE_CHECKING:
    from engine.llm import LLM

Results = Mapping[str, Any]

RUNS = 3  # of the reference workload
PROMPT, NEW, TURNS = 128, 256, 5  # tokens of a request alone, and how often it is asked
LONG_PROMPT, LONG_NEW, LONG_TURNS = 4096, 16, 7
UNMEASURED = 2  # turns in front: they compile what such a shape needs
BATCHES = (1, 32, 256)  # of decode steps
PROFILED = (1, 256)


def offline(settings: Settings) -> Iterator[Results]:
    """All that the part `speed` measures with a loaded engine."""
    with opened(settings) as llm:
        spec, engine = llm.spec, llm.engine
        ceiling = ceiling_of(spec)
        yield about(spec, ceiling)
        result = run_reference(llm, RUNS, ceiling)
        yield {"reference_output_tokens_per_s": result.runs, "reference": result.as_json()}
        yield alone(llm)
        yield long_prompt(llm)
        assert ceiling is not None  # made-up weights are weights
        for step in steps_beside_floor(engine, spec, ceiling, BATCHES):
            show("a decode step beside its floor, ms", HEADER, [step.row()])
            yield {"decode_steps": [asdict(step)]}
        for batch in PROFILED:
            kernels = kernels_of_a_step(engine, spec, batch)
            yield {f"kernels_at_batch_{batch}": [asdict(kernel) for kernel in kernels]}


def beside_http(settings: Settings) -> Iterator[Results]:
    """What the part `http` is compared with."""
    with opened(settings) as llm:
        yield about(llm.spec, None)
        yield {"http_offline_output_tokens_per_s": run_reference(llm, 2, None).runs}


def about(spec: BackendSpec, ceiling: Ceiling | None) -> Results:
    """What a reader needs to know before comparing results, as far as it is known."""
    return {key: value for key, value in facts(spec, ceiling).items() if value is not None}


def run_reference(llm: LLM, repeat: int, ceiling: Ceiling | None) -> Result:
    """Run the reference workload, the first time unmeasured."""
    return run_again(llm, reference(llm.spec.vocabulary), repeat, ceiling)


def run_again(llm: LLM, workload: Workload, repeat: int, ceiling: Ceiling | None) -> Result:
    """`run` after a run that is not measured: that one meets every shape there is."""
    measure(llm, workload, len(workload.jobs), 1)
    return run(llm, workload, repeat, ceiling)


def run(llm: LLM, workload: Workload, repeat: int, ceiling: Ceiling | None) -> Result:
    """Run a workload, all of it at once, and show its card. Raises BackendFailed."""
    runs = measure(llm, workload, len(workload.jobs), repeat)
    for each in runs:
        check(each.records)
    result = fold(runs, llm.spec, ceiling)
    show(f"{workload.name}: {llm.spec.model}", ("", "median run"), result.rows())
    return result


def alone(llm: LLM) -> Results:
    """Milliseconds a token of one request: its whole answer, prompt included, over its tokens."""
    whole, gaps = [], []
    for turn in range(UNMEASURED + TURNS):
        record = _ask(llm, alike(1, PROMPT, NEW, llm.spec.vocabulary, turn), f"alone-{turn}")
        if turn >= UNMEASURED:
            assert record.ended is not None
            whole.append(round(1000 * (record.ended - record.submitted) / NEW, 4))
            gaps.append(round(1000 * (record.mean_gap() or 0.0), 4))
    return {
        "batch1_ms_per_token": percentile(whole, 50),
        "batch1_runs": whole,
        "batch1_ms_between_tokens": percentile(gaps, 50),
    }


def long_prompt(llm: LLM) -> Results:
    """Milliseconds to the first token of a long prompt that no cache knows."""
    times = []
    for turn in range(UNMEASURED + LONG_TURNS):
        workload = alike(1, LONG_PROMPT, LONG_NEW, llm.spec.vocabulary, turn)
        first = _ask(llm, workload, f"long-{turn}").first_token()
        assert first is not None
        times.append(round(1000 * first, 3))
    times = times[UNMEASURED:]
    return {f"ttft_{LONG_PROMPT}_ms": percentile(times, 50), f"ttft_{LONG_PROMPT}_runs": times}


def _ask(llm: LLM, workload: Workload, label: str) -> Record:
    """Ask for the one job of a workload, of which no cache knows anything."""
    llm.engine.flush()
    (record,) = Driver(llm.engine, workload, 1, label).run().records
    check([record])
    return record


def check(records: list[Record]) -> None:
    """Raises BackendFailed when a request failed: its run measured something else."""
    for record in records:
        if record.failed:
            raise BackendFailed(f"a request failed: {record.failure}")
