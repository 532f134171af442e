"""Decode steps beside what the device could do at best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backend.interface import BackendFailed, BackendSpec
from bench.card import milliseconds, percent
from bench.decode_step import measure_batches
from bench.drive import Steppable
from bench.roofline import Ceiling, StepWork, step_floor
from bench.summary import Percentiles, percentile

HEADER = ("batch", "context", "step, p50 / p90 / p99", "bytes", "products", "floor", "share")
REPEAT = 2  # runs of each batch


@dataclass(frozen=True, slots=True)
class StepBesideFloor:
    """Quiet decode steps of one batch, in milliseconds, from one settlement to the next: with
    several steps in flight, that is what a step takes.
    """

    batch: int
    steps: int
    context: float  # positions that a row attended to, on average
    interval_ms: Percentiles
    bytes_ms: float  # to read weights, keys and values
    products_ms: float
    floor_ms: float  # both, one after the other
    share: float  # of the floor in the median step

    def row(self) -> tuple[str, ...]:
        """Under HEADER."""
        parts = (self.bytes_ms, self.products_ms, self.floor_ms)
        return (
            f"{self.batch}",
            f"{self.context:,.0f}",
            milliseconds(self.interval_ms, digits=3),
            *(f"{part:.3f}" for part in parts),
            percent(self.share),
        )


def steps_beside_floor(
    engine: Steppable, spec: BackendSpec, ceiling: Ceiling, batches: Sequence[int]
) -> Iterator[StepBesideFloor]:
    """Measure each batch. Raises Unsupported when the engine is too small for the largest."""
    for batch, quiet in measure_batches(engine, spec, REPEAT, batches):
        yield beside_floor(batch, quiet, spec, ceiling)


def beside_floor(
    batch: int, quiet: Sequence[StepWork], spec: BackendSpec, ceiling: Ceiling
) -> StepBesideFloor:
    """Summarise the quiet steps of one batch. Raises BackendFailed when there are none."""
    if not quiet:
        raise BackendFailed(f"no step of {batch} rows was a quiet one")
    floors = [step_floor(work, spec, ceiling) for work in quiet]
    typical = sorted(floors, key=lambda floor: floor.in_turn)[len(floors) // 2]
    interval = percentile([work.interval for work in quiet], 50)
    assert interval is not None
    return StepBesideFloor(
        batch=batch,
        steps=len(quiet),
        context=sum(work.context for work in quiet) / batch / len(quiet),
        interval_ms=Percentiles.of_seconds(work.interval for work in quiet),
        bytes_ms=round(1000 * (typical.weights + typical.attention), 4),
        products_ms=round(1000 * typical.products, 4),
        floor_ms=round(1000 * typical.in_turn, 4),
        share=round(typical.in_turn / interval, 4),
    )
