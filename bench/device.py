"""What the device does at best, measured; and its name."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.roofline import Ceiling

if TYPE_CHECKING:
    import torch

BUDGET_S = 0.15  # for each of the measurements


@dataclass(frozen=True, slots=True)
class Probe:
    """Work that is large enough for full speed: far beyond any cache, and over the launch."""

    read_bytes: int
    side: int  # of the square matrices
    turns: int  # launched one after the other, so that waiting for the last costs each little


PROBES = {
    "cpu": Probe(2**28, 1024, turns=1),
    "mps": Probe(2**28, 4096, turns=4),
    "cuda": Probe(2**30, 8192, turns=8),
}


def measure_ceiling(device: str, dtype: str) -> Ceiling:
    """Read bandwidth by summing a large buffer, matrix rate by a square product; best of several.

    The rate is the better of `dtype`'s and float32's, because a device without instructions for
    `dtype` can always widen it. Takes about half a second.
    """
    import torch

    place = torch.device(device)
    probe = PROBES[place.type]
    buffer = torch.ones(probe.read_bytes // 4, dtype=torch.float32, device=place)
    read_s = _best_seconds(place, lambda: buffer.sum(), probe.turns)
    product_s = min(
        _product_seconds(place, probe, kind) for kind in {torch.float32, getattr(torch, dtype)}
    )
    return Ceiling(probe.read_bytes / read_s, 2 * probe.side**3 / product_s)


def _product_seconds(place: torch.device, probe: Probe, dtype: torch.dtype) -> float:
    import torch

    side = probe.side
    left = torch.randn((side, side), device=place).to(dtype)  # ones would flatter some chips
    weight = torch.randn((side, side), device=place).to(dtype)
    work = functools.partial(torch.nn.functional.linear, left, weight)
    return _best_seconds(place, work, probe.turns)


def _best_seconds(place: torch.device, work: Callable[[], torch.Tensor], turns: int) -> float:
    """Of one of `turns` in a row: the shortest of as many rows as fit the budget, or of one."""
    best = float("inf")
    begun = end = time.perf_counter()
    while end - begun < BUDGET_S:
        start = time.perf_counter()
        for _ in range(turns):
            work()
        _wait_for(place)
        end = time.perf_counter()
        best = min(best, (end - start) / turns)
    return best


def _wait_for(place: torch.device) -> None:
    import torch

    if place.type != "cpu":
        torch.get_device_module(place).synchronize()


def describe(device: str) -> str:
    """`device` with the name of the chip, for a reader who compares machines."""
    if device.startswith("cuda"):
        import torch

        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
