"""What goes to a peer, and what comes of its answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backend.interface import BackendFailed, BackendSpec, Unsupported
from bench.comparison import Order, Outcome, compare, judge, order_for
from bench.workloads import mix
from config import BackendSettings
from engine.opening import open_backend


@pytest.fixture
def spec() -> BackendSpec:
    return open_backend(BackendSettings(impl="fake")).spec


def test_an_order_holds_the_same_prompts_and_lengths(spec: BackendSpec) -> None:
    workload = mix(spec.vocabulary)
    order = order_for(workload, replace(spec, folder="model"), made_up=True, repeat=3)
    assert [(tuple(prompt), new) for prompt, new in order.jobs] == [
        (job.prompt, job.new_tokens) for job in workload.jobs
    ]
    assert (order.folder, order.made_up, order.repeat) == ("model", True, 3)


def test_a_backend_without_a_checkpoint_has_nothing_to_compare(spec: BackendSpec) -> None:
    with pytest.raises(Unsupported, match="the backend fake has no model folder"):
        order_for(mix(spec.vocabulary), spec, made_up=False, repeat=1)


def test_the_ratio_is_ours_over_the_median_of_theirs() -> None:
    comparison = judge(Outcome("peer", output_tokens=100, durations_s=[1.0, 4.0, 2.0]), ours=150.0)
    assert comparison.runs == [100.0, 25.0, 50.0]
    assert (comparison.output_tokens_per_s, comparison.ratio) == (50.0, 3.0)


def test_a_peer_that_fails_is_one_line_with_its_last_words(tmp_path: Path) -> None:
    order = Order(str(tmp_path / "nowhere"), "cpu", False, 0.0, [([1], 2)], 1)
    with pytest.raises(BackendFailed, match=r"transformers failed in the comparison: \S") as failed:
        compare("transformers", order, ours=1.0)
    assert "\n" not in str(failed.value)
