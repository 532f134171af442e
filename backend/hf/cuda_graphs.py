"""What all our CUDA graphs share: how they are recorded, and which sizes there are.

Graphs run one after the other on one stream, so all of them share one memory pool: what a graph
computed is good until the next one runs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import torch

from backend.interface import first_line

logger = logging.getLogger(__name__)

EAGER_STEPS = 8  # of one size, before it is captured between two steps

Result = TypeVar("Result")
Graphs = TypeVar("Graphs")


class Recorder:
    """Captures work into graphs, on a stream and in a memory pool of its own."""

    def __init__(self, device: str) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Its launches, which do not run now, and what it returned, to be written by each run. It
        has run before, so that every kernel is compiled and loaded.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # thread_local: what other threads of this process do is none of our capture
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # says that the capture is void, and hides why
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, result


class Sizes(Generic[Graphs]):
    """Graphs by size, captured lazily: when a size has been met often, or in idle moments."""

    def __init__(self, sizes: Sequence[int], capture: Callable[[int], Graphs]) -> None:
        """`sizes` ascend."""
        self._sizes = sizes
        self._capture = capture
        self._graphs: dict[int, Graphs] = {}
        self._failed: set[int] = set()  # sizes that could not be captured
        self._met: Counter[int] = Counter()

    @property
    def largest(self) -> int:
        return self._sizes[-1]

    def find(self, wanted: int) -> tuple[int, Graphs] | None:
        """The smallest size that holds `wanted`, and its graphs. None: too large, or not there
        yet.
        """
        if wanted > self.largest:
            return None
        size = next(each for each in self._sizes if each >= wanted)
        if size not in self._graphs and size not in self._failed:
            self._met[size] += 1
            if self._met[size] <= EAGER_STEPS:
                return None
            self._make(size)
        return None if size in self._failed else (size, self._graphs[size])

    def prepare(self) -> bool:
        """Capture one more size, the most wanted first, else the largest: those after it then fit
        into the memory that it freed. False: all of them are there.
        """
        done = self._graphs.keys() | self._failed
        missing = [size for size in self._sizes if size not in done]
        if not missing:
            return False
        self._make(max(missing, key=lambda size: (self._met[size], size)))
        return True

    def _make(self, size: int) -> None:
        """Capture a size; one that cannot be captured, for want of memory, stays eager. If it was
        the device that failed, the next step tells.
        """
        started = time.monotonic()
        try:
            self._graphs[size] = self._capture(size)
        except RuntimeError as error:  # torch.OutOfMemoryError among them
            self._failed.add(size)
            torch.cuda.empty_cache()
            logger.warning("size %d runs without a CUDA graph: %s", size, first_line(error))
            return
        logger.debug("captured size %d in %.0f ms", size, 1000 * (time.monotonic() - started))


def ladder(largest: int, steps: Sequence[tuple[int, int]]) -> list[int]:
    """Ascending sizes, the last of which is `largest`. `steps`: (up to, apart)."""
    sizes = [0]
    while sizes[-1] < largest:
        apart = next(apart for end, apart in steps if sizes[-1] < end)
        sizes.append(min(sizes[-1] + apart, largest))
    return sizes[1:]
