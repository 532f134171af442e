"""Python's cyclic garbage collector, kept from stopping an engine in the middle of a step."""

from __future__ import annotations

import gc

# Containers that come to live before the youngest generation is looked at, and how often of those
# the older ones are. Nothing that a step makes is in a cycle, and a look at what steps have made
# takes as long as tens of them: it touches the ids of every sequence and cached page. Those of a
# full cache stay below the bound; what leaks in cycles is found when it has grown to that.
THRESHOLDS = (2_000_000, 20, 1_000)


def settle_collector() -> None:
    """Once, when what lives as long as the process is there: no collection need look at it again,
    and the others become rare.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
