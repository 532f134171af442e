"""The fixed workloads are the documented ones, on any vocabulary."""

from __future__ import annotations

import random

import pytest

from backend.interface import RequestRefused
from bench.workloads import WORKLOADS, alike, mix, reference, repeated

LARGE = 50_000


def test_the_reference_workload_has_its_documented_size() -> None:
    workload = reference(LARGE)
    assert len(workload.jobs) == 256
    assert (workload.prompt_tokens, workload.new_tokens) == (142_827, 133_966)
    assert workload.temperature == 0.6


def test_the_reference_workload_is_drawn_as_documented() -> None:
    random.seed(0)
    prompts = [
        [random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)
    ]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    jobs = reference(LARGE).jobs
    assert [list(job.prompt) for job in jobs] == prompts
    assert [job.new_tokens for job in jobs] == lengths


def test_the_mix_has_its_documented_size() -> None:
    workload = mix(LARGE)
    assert len(workload.jobs) == 32
    assert (workload.prompt_tokens, workload.new_tokens) == (4637, 2584)
    assert workload.temperature == 0
    assert max(max(job.prompt) for job in workload.jobs) < 40_000


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_small_vocabulary_changes_ids_but_no_length(name: str) -> None:
    small, large = WORKLOADS[name](260), WORKLOADS[name](LARGE)
    assert all(0 <= id < 260 for job in small.jobs for id in job.prompt)
    assert [(len(job.prompt), job.new_tokens) for job in small.jobs] == [
        (len(job.prompt), job.new_tokens) for job in large.jobs
    ]


def test_the_first_requests_of_a_workload_are_those_of_the_whole() -> None:
    assert mix(LARGE).first(5).jobs == mix(LARGE).jobs[:5]


def test_more_requests_than_a_workload_has_are_refused() -> None:
    with pytest.raises(RequestRefused, match="has 32 requests, 33 were asked for"):
        mix(LARGE).first(33)


def test_a_warm_up_is_the_first_requests_cut_short() -> None:
    warm_up = mix(LARGE).warm_up(count=3, prompt_tokens=32, new_tokens=4)
    assert [job.prompt for job in warm_up.jobs] == [job.prompt[:32] for job in mix(LARGE).jobs[:3]]
    assert {job.new_tokens for job in warm_up.jobs} == {4}


def test_requests_of_one_shape_differ_by_seed_and_from_each_other() -> None:
    prompts = {
        job.prompt for seed in range(3) for job in alike(4, 16, 8, vocabulary=LARGE, seed=seed).jobs
    }
    assert len(prompts) == 12
    assert {len(prompt) for prompt in prompts} == {16}


def test_a_repeated_prompt_is_the_same_request_each_time() -> None:
    workload = repeated((1, 2, 3), new_tokens=8, count=4)
    assert set(workload.jobs) == {workload.jobs[0]}
    assert (workload.prompt_tokens, workload.new_tokens) == (12, 32)
