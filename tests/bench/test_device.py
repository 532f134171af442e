"""The ceiling of this machine, measured."""

from __future__ import annotations

import time

import pytest

from bench.device import describe, measure_ceiling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_ceiling_is_measured_in_a_moment_and_plausible(dtype: str) -> None:
    start = time.monotonic()
    ceiling = measure_ceiling("cpu", dtype)
    assert time.monotonic() - start < 10
    assert 1e8 < ceiling.read_bytes_per_s < 1e13
    assert 1e8 < ceiling.flops_per_s < 1e16


def test_the_device_is_described_with_the_name_of_its_chip() -> None:
    assert describe("cpu").startswith("cpu: ")
    assert len(describe("cpu")) > len("cpu: , 1 cores")
