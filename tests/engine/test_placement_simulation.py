"""What placement is for: the same requests under each policy, in virtual time.

Takes about eight seconds. The runs are exact: no clock, no chance but the seeds.
"""

from __future__ import annotations

from functools import cache

import pytest

from engine.placement import PLACEMENTS
from tests.engine.fleet_simulation import simulate

OTHERS = [mode for mode in PLACEMENTS if mode != "cache_aware"]

report = cache(simulate)


def test_every_workload_says_the_same_twice() -> None:
    assert simulate("cache_aware", "nothing shared") == report("cache_aware", "nothing shared")


@pytest.mark.parametrize("mode", OTHERS)
def test_shared_prefixes_are_found_again_where_they_are_cached(mode: str) -> None:
    ours, other = report("cache_aware", "shared prefixes"), report(mode, "shared prefixes")
    assert ours.hit_rate > 2 * other.hit_rate
    assert ours.ttft_p50 < other.ttft_p50 / 4
    assert ours.ttft_p99 < other.ttft_p99
    assert ours.spread < 1.25


def test_a_hot_prefix_is_answered_by_every_replica_with_no_longer_tail() -> None:
    ours = report("cache_aware", "one hot prefix")
    assert ours.spread < 1.1
    assert ours.ttft_p99 <= 1.1 * min(report(mode, "one hot prefix").ttft_p99 for mode in OTHERS)


def test_going_by_the_longest_match_alone_would_pin_a_hot_prefix() -> None:
    ours, pinned = (report(mode, "one hot prefix") for mode in ("cache_aware", "(longest match)"))
    assert pinned.ttft_p99 > 1.5 * ours.ttft_p99


def test_without_anything_shared_the_load_is_as_even_as_by_the_fewest() -> None:
    ours, fewest = (report(mode, "nothing shared") for mode in ("cache_aware", "fsfs"))
    assert ours.spread < fewest.spread + 0.1
    assert ours.ttft_p99 <= fewest.ttft_p99
    assert ours.hit_rate == 0
