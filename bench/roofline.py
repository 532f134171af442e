"""How near a run came to what the device could do at best. Pure.

The floor of a step is the time for its products with the weights, or for reading the weights if
that takes longer, and then for reading the keys and values behind every row that got a token
(Williams et al. 2009, with attention after the products). Simplified: the head counts for each
position, attention's own products and all activations for nothing, and a mixture of experts as if
each token used all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backend.interface import BackendSpec


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the device does at best, measured in the same run."""

    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step as seen from outside."""

    positions: int  # tokens that it computed
    rows: int  # sequences that got a token from it
    context: int  # positions that these attend to, together
    seconds: float  # from its launch to its settlement
    interval: float  # since the step before had settled


@dataclass(frozen=True, slots=True)
class Floor:
    """What a step cannot do without, in seconds."""

    products: float  # with the weights
    weights: float  # to read them
    attention: float  # to read keys and values

    @property
    def shortest(self) -> float:
        """With the weights read while they are multiplied by."""
        return max(self.products, self.weights) + self.attention

    @property
    def in_turn(self) -> float:
        """With nothing at the same time."""
        return self.products + self.weights + self.attention


def step_floor(work: StepWork, spec: BackendSpec, ceiling: Ceiling) -> Floor:
    """The parts that `work` has on a device."""
    return Floor(
        products=2 * spec.parameters * work.positions / ceiling.flops_per_s,
        weights=spec.weight_bytes / ceiling.read_bytes_per_s,
        attention=spec.kv_bytes_per_token * work.context / ceiling.read_bytes_per_s,
    )


def step_floor_s(work: StepWork, spec: BackendSpec, ceiling: Ceiling) -> float:
    """The shortest time that `work` can take, in seconds."""
    return step_floor(work, spec, ceiling).shortest


def roofline_share(
    steps: Iterable[StepWork], spec: BackendSpec, ceiling: Ceiling, duration_s: float
) -> float:
    """The floors of `steps` as a share of the time that was measured for all of them."""
    return sum(step_floor_s(work, spec, ceiling) for work in steps) / duration_s
