"""Python's cyclic garbage collector, kept from stopping an engine in the middle of a step."""

from __future__ import annotations

import gc

# Allocations before the youngest generation is looked at, and how often of those the older ones
# are: a look at all of a full cache's books takes as long as tens of steps, and finds nothing,
# since nothing that a step makes is in a cycle.
THRESHOLDS = (50_000, 20, 1_000)


def settle_collector() -> None:
    """Once, when what lives as long as the process is there: no collection need look at it again,
    and the others become rare.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
