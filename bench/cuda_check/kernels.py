"""Where the time of a decode step goes on the device, by torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from backend.interface import BackendFailed, BackendSpec, StepOutput, Submission
from bench.card import percent, show
from bench.decode_step import rows
from bench.drive import Driver, Steppable

SKIPPED, PROFILED = 8, 16  # quiet steps in front, and those that are looked at
SHOWN = 25  # rows of the table; what is left is one more
NAME = 80  # characters of a name that are shown

Event = tuple[str, float]  # what ran on the device, for how many microseconds


@dataclass(frozen=True, slots=True)
class Kernel:
    """All runs of one kernel in a step, on average."""

    name: str
    calls: float
    us: float
    share: float  # of the time of all

    def row(self) -> tuple[str, ...]:
        """Of the table."""
        return self.name[:NAME], f"{self.calls:,.1f}", f"{self.us:,.1f}", percent(self.share)


def tabulate(events: Iterable[Event], steps: int) -> list[Kernel]:
    """The kernels of one step, the longest first, all beyond SHOWN as one."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in events:
        times[name].append(microseconds)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    rest = [time for _, spent in ranked[SHOWN:] for time in spent]
    shown = [*ranked[:SHOWN], *([(f"{len(ranked) - SHOWN} others", rest)] if rest else [])]
    whole = sum(map(sum, times.values()))
    return [
        Kernel(name, len(spent) / steps, round(sum(spent) / steps, 2), round(sum(spent) / whole, 4))
        for name, spent in shown
    ]


class ProfiledSteps:
    """An engine whose quiet decode steps of `batch` rows are profiled, after some that are not."""

    def __init__(self, engine: Steppable, batch: int) -> None:
        self._engine = engine
        self._batch = batch
        self._quiet = 0
        self._profiler: Any = None
        self.events: list[Event] = []

    def submit(self, submission: Submission) -> None:
        """Take over a submission."""
        self._engine.submit(submission)

    def step(self, wait: float = 0.0) -> StepOutput:
        """Do the next piece of work."""
        if self._quiet == SKIPPED and self._profiler is None:
            self._begin()
        output = self._engine.step(wait)
        if output.step_tokens == self._batch == len(output.deltas):
            self._quiet += 1
            if self._quiet == SKIPPED + PROFILED:
                self._end()
        return output

    def _begin(self) -> None:
        """With nothing in flight on the device: as many steps end from here on as are launched."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        self._profiler = profile(activities=[ProfilerActivity.CUDA])
        self._profiler.__enter__()

    def _end(self) -> None:
        import torch

        torch.cuda.synchronize()
        self._profiler.__exit__(None, None, None)
        self.events = [
            (event.name, event.time_range.elapsed_us())
            for event in self._profiler.events()
            if event.device_type.name == "CUDA"
        ]


def kernels_of_a_step(engine: Steppable, spec: BackendSpec, batch: int) -> Sequence[Kernel]:
    """Profile decode steps of `batch` rows and show the table. Raises BackendFailed."""
    for turn in range(2):  # the first one wakes the profiler
        profiled = ProfiledSteps(engine, batch)
        Driver(profiled, rows(batch, spec, seed=turn), batch, f"profile-{batch}-{turn}").run()
    if not profiled.events:
        raise BackendFailed(f"the profiler saw nothing of {PROFILED} steps of {batch} rows")
    kernels = tabulate(profiled.events, PROFILED)
    whole = sum(kernel.us for kernel in kernels)
    calls = sum(kernel.calls for kernel in kernels)
    show(
        f"kernels of a decode step of {batch} rows: {calls:,.0f} calls, {whole:,.0f} us together",
        ("kernel", "calls", "us", "share"),
        [kernel.row() for kernel in kernels],
    )
    return kernels
