"""Other work than the reference workload: long prompts, shared prefixes, a larger model, answers
that are the same bit by bit; and whether the memory is what was forecast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from backend.interface import BackendSpec
from bench.card import show
from bench.cuda_check.speed import Results, about, alone, run, run_again, run_reference
from bench.cuda_check.steps import HEADER, steps_beside_floor
from bench.opened_engine import opened
from bench.roofline import Ceiling
from bench.workloads import alike, shared_prefixes
from config import Settings
from local_bench import ceiling_of

if TYPE_CHECKING:
    from engine.llm import LLM

LONG_PROMPTS, LONG_PROMPT, SHORT_ANSWER = 32, 8192, 64
GROUPS, MEMBERS, SHARED, OWN, ANSWER = 32, 8, 2048, 32, 128
LARGE_ROWS, LARGE_PROMPT, LARGE_ANSWER = 256, 128, 64
RUNS = 3


def other_work(settings: Settings) -> Iterator[Results]:
    """With the engine as the reference workload has it."""
    with opened(settings) as llm:
        ceiling = ceiling_of(llm.spec)
        yield about(llm.spec, ceiling)
        workload = alike(LONG_PROMPTS, LONG_PROMPT, SHORT_ANSWER, llm.spec.vocabulary, seed=0)
        result = run(llm, workload, RUNS, ceiling)
        yield {"prompt_heavy": result.as_json()}
        rates, report = shared(llm, ceiling)
        yield {"shared_prefix_tokens_per_s": rates, "shared_prefix": report}
        yield {"usual_output_tokens_per_s": run_reference(llm, 1, ceiling).runs}
        yield {"usual_batch1_ms_per_token": alone(llm)["batch1_ms_per_token"]}
        yield {"memory_used_at_the_end": used(), **memory(settings, llm.spec)}


def shared_uncached(settings: Settings) -> Iterator[Results]:
    """With PREFIX_CACHE=0."""
    with opened(settings) as llm:
        rates, report = shared(llm, ceiling_of(llm.spec))
        yield {"shared_prefix_uncached_tokens_per_s": rates, "shared_prefix_uncached": report}


def shared(llm: LLM, ceiling: Ceiling | None) -> tuple[list[float], dict[str, object]]:
    """Output tokens a second of each run, and the whole report."""
    workload = shared_prefixes(GROUPS, MEMBERS, SHARED, OWN, ANSWER, llm.spec.vocabulary)
    result = run(llm, workload, RUNS, ceiling)
    return result.runs, result.as_json()


def deterministic(settings: Settings) -> Iterator[Results]:
    """With DETERMINISTIC=1."""
    with opened(settings) as llm:
        yield {"deterministic_output_tokens_per_s": run_reference(llm, 1, None).runs}
        single = alone(llm)["batch1_ms_per_token"]
        yield {"deterministic_batch1_ms_per_token": single}


def large(settings: Settings) -> Iterator[Results]:
    """The shape of a larger model, with as many sequences."""
    with opened(settings) as llm:
        spec, ceiling = llm.spec, ceiling_of(llm.spec)
        assert ceiling is not None
        workload = alike(LARGE_ROWS, LARGE_PROMPT, LARGE_ANSWER, spec.vocabulary, seed=0)
        result = run_again(llm, workload, RUNS, ceiling)
        yield {"large_model": spec.model, "large_output_tokens_per_s": result.runs}
        (step,) = steps_beside_floor(llm.engine, spec, ceiling, (LARGE_ROWS,))
        show(f"a decode step of {spec.model} beside its floor, ms", HEADER, [step.row()])
        yield {"large": result.as_json(), "large_decode_step": asdict(step)}
        yield memory(settings, spec)


def memory(settings: Settings, spec: BackendSpec) -> Results:
    """Pages beside those that `engine.plan` makes of the config and the device's size alone."""
    import torch

    from engine.plan import make_plan

    _, total = torch.cuda.mem_get_info()
    pages = make_plan(settings.backend, total).pages
    return {
        "pages_forecast_and_made": [[spec.model, pages, spec.pages]],
        "memory_forecast_errors": [round(abs(pages / spec.pages - 1), 5)],
    }


def used() -> float:
    """Share of the device's memory in use; what steps needed at most is still held."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return round(1 - free / total, 4)
