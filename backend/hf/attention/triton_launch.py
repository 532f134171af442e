"""What every launch of our attention kernels is made from."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import log
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from triton.runtime import driver

from backend.hf.attention import AttentionOptions, AttentionSetup
from backend.hf.kernels.chip import hopper_or_later

SMALLEST_DOT = 16  # sides of a tile that tensor cores multiply
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel cuts its work: query rows and keys of a tile, warps, stages of loads ahead."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread at most, for more programs beside each other

    @property
    def options(self) -> dict[str, int | None]:
        """Of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


@dataclass(frozen=True, eq=False, slots=True)
class LayerCall:
    """Attention of one layer for the tokens of a step."""

    layer: int
    query: Tensor  # [tokens, heads, key_width], the last dimension dense
    kv: Tensor  # [tokens, row], the last dimension dense
    pool: Tensor  # [positions, row]
    output: Tensor  # [tokens, heads, value_width]
    options: AttentionOptions

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def scaling(self) -> tuple[float, float]:
        """`inner` and `outer` of the kernels."""
        scale, softcap = self.options.scale, self.options.softcap
        return (scale / log(2), 1.0) if softcap is None else (scale / softcap, softcap / log(2))


class Kernels:
    """The chip and the shapes that kernels are compiled for."""

    def __init__(self, setup: AttentionSetup) -> None:
        geometry, device = setup.geometry, torch.device(setup.device)
        chip = driver.active.utils.get_device_properties(device.index or 0)
        self.geometry = geometry
        self.page_tokens = setup.page_tokens
        self.dtype = setup.dtype
        self.processors: int = chip["multiprocessor_count"]
        self.room: int = chip["max_shared_mem"]  # bytes that a program can have
        self.hopper = hopper_or_later(device)
        self.widths = padded(geometry.key_width), padded(geometry.value_width)

    def constants(self, call: LayerCall) -> tuple[int, ...]:
        """GROUP, KV_HEADS, KEY and VALUE of a kernel."""
        geometry = self.geometry
        group = call.heads // geometry.kv_heads
        return group, geometry.kv_heads, geometry.key_width, geometry.value_width

    def keys(self, most: int, stages: int, rows: int = 0) -> int:
        """Keys of a tile, so that `stages` of them and their values fit into shared memory beside
        `rows` queries.
        """
        key, value = self.widths
        room = self.room - rows * key * self.dtype.itemsize
        while most > SMALLEST_DOT and most * (key + value) * self.dtype.itemsize * stages > room:
            most //= 2
        return most


class StepCache(Generic[Value]):
    """What the layers of a step share.

    Layers come in rising order, so a layer that does not is the first of another step: a graph must
    hold what makes the value, even when its batch ran before it was captured.
    """

    def __init__(self) -> None:
        self._owner: Any = None
        self._values: dict[Hashable, tuple[int, Value]] = {}

    def get(self, owner: Any, key: Hashable, layer: int, make: Callable[[], Value]) -> Value:
        """The value of `key` for the step of `owner`, made by its first layer."""
        if owner is not self._owner:
            self._owner, self._values = owner, {}
        known = self._values.get(key)
        value = known[1] if known is not None and known[0] < layer else make()
        self._values[key] = layer, value
        return value


def padded(size: int) -> int:
    """The power of two that holds `size`, no less than a tile's side."""
    return max(SMALLEST_DOT, 1 << (size - 1).bit_length())
