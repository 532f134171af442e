"""How long one decode step takes at a given batch and context, on a quiet engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backend.interface import BackendSpec, Unsupported
from bench.drive import Driver, Steppable
from bench.roofline import Ceiling, StepWork, step_floor_s
from bench.summary import Percentiles, percentile
from bench.workloads import Workload, alike

BATCHES = (1, 8, 32)
CONTEXT = 256  # of the average row in the middle of the measured steps
QUIET_STEPS = 32  # about as many in a run


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """Quiet decode steps of one batch size: every row got a token, and no prompt was computed."""

    batch: int
    steps: int
    context: float | None  # positions that a row attended to, on average
    step_ms: Percentiles  # from launch to settlement
    interval_ms: Percentiles  # from one settlement to the next: what a client sees
    floor_ms: float | None  # of the median step; None on a device without a ceiling
    roofline_share: float | None  # of the median step


def rows(batch: int, spec: BackendSpec, seed: int) -> Workload:
    """`batch` requests that decode together for `QUIET_STEPS` around `CONTEXT`.

    Prompts are computed while the rows before them decode already, so answers are longer by as many
    tokens, and prompts shorter by half of that.
    """
    room = max(spec.max_step_tokens - batch, 1)  # for prompts, beside the decodes
    filling = batch * CONTEXT // room
    prompt_tokens = max(CONTEXT - (QUIET_STEPS + filling) // 2, 1)
    return alike(batch, prompt_tokens, QUIET_STEPS + filling, spec.vocabulary, seed)


def measure_batches(
    engine: Steppable, spec: BackendSpec, repeat: int, batches: Sequence[int] = BATCHES
) -> Iterator[tuple[int, list[StepWork]]]:
    """Each batch size with its quiet steps. A first run of each warms up and does not count.

    Raises Unsupported when the engine is too small for the largest.
    """
    _check_room(spec, max(batches))
    for batch in batches:
        quiet: list[StepWork] = []
        for turn in range(repeat + 1):
            workload = rows(batch, spec, seed=1000 * turn + batch)
            measured = Driver(engine, workload, batch, f"decode-{batch}-{turn}").run()
            if turn:
                quiet += [work for work in measured.steps if work.rows == work.positions == batch]
        yield batch, quiet


def _check_room(spec: BackendSpec, batch: int) -> None:
    if spec.max_running < batch:
        raise Unsupported(
            f"a batch of {batch} is wanted, MAX_RUNNING is {spec.max_running}: raise it"
        )
    workload = rows(batch, spec, seed=0)
    pages = sum(spec.pages_for(len(job.prompt) + job.new_tokens) for job in workload.jobs)
    if spec.pages < pages:
        raise Unsupported(
            f"{pages:,} pages are wanted for a batch of {batch}, the cache has {spec.pages:,}: "
            "raise PAGE_TOKEN_BUDGET"
        )


def decode_step(
    batch: int, quiet: Sequence[StepWork], spec: BackendSpec, ceiling: Ceiling | None
) -> DecodeStep:
    """Summarise the quiet steps of one batch size."""
    step = percentile([work.seconds for work in quiet], 50)
    context = percentile([work.context / batch for work in quiet], 50)
    floor = ceiling and percentile([step_floor_s(work, spec, ceiling) for work in quiet], 50)
    return DecodeStep(
        batch=batch,
        steps=len(quiet),
        context=context,
        step_ms=Percentiles.of_seconds(work.seconds for work in quiet),
        interval_ms=Percentiles.of_seconds(work.interval for work in quiet),
        floor_ms=round(1000 * floor, 3) if floor else None,
        roofline_share=round(floor / step, 4) if floor and step else None,
    )
