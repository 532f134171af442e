"""Floors against the ones that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backend.interface import BackendSpec
from bench.roofline import Ceiling, StepWork, roofline_share, step_floor_s

# SmolLM2-135M in bfloat16 on two cores with AVX512-BF16
SMALL = BackendSpec(
    name="hf",
    model="small",
    folder=None,
    vocabulary=49152,
    max_model_len=8192,
    stop_ids=(2,),
    page_tokens=16,
    pages=1024,
    max_running=64,
    max_step_tokens=512,
    depth=1,
    device="cpu",
    dtype="bfloat16",
    attention="sdpa",
    parameters=134_515_008,
    weight_bytes=2 * 134_515_008,
    kv_bytes_per_token=30 * 2 * 3 * 64 * 2,
)
CORES = Ceiling(read_bytes_per_s=82e9, flops_per_s=960e9)


def decode(batch: int, seconds: float = 1.0) -> StepWork:
    return StepWork(batch, batch, batch * 256, seconds, seconds)


@pytest.mark.parametrize(("batch", "floor_ms"), [(1, 3.4), (8, 3.9), (32, 11.3)])
def test_the_floor_of_a_decode_step_is_the_one_worked_out_by_hand(
    batch: int, floor_ms: float
) -> None:
    assert 1000 * step_floor_s(decode(batch), SMALL, CORES) == pytest.approx(floor_ms, abs=0.06)


def test_a_step_without_rows_that_got_a_token_pays_its_products_only() -> None:
    chunk = StepWork(positions=512, rows=0, context=0, seconds=1.0, interval=1.0)
    assert step_floor_s(chunk, SMALL, CORES) == 2 * 512 * SMALL.parameters / CORES.flops_per_s


def test_an_engine_as_fast_as_the_floor_has_the_whole_roofline() -> None:
    steps = [decode(batch) for batch in (1, 8, 32)]
    floor = sum(step_floor_s(work, SMALL, CORES) for work in steps)
    assert roofline_share(steps, SMALL, CORES, duration_s=floor) == pytest.approx(1)
    assert roofline_share(steps, SMALL, CORES, duration_s=4 * floor) == pytest.approx(0.25)


def test_a_model_of_half_the_bytes_has_a_lower_floor_where_reading_is_the_limit() -> None:
    half = replace(SMALL, weight_bytes=SMALL.weight_bytes // 2)
    assert step_floor_s(decode(1), half, CORES) < 0.6 * step_floor_s(decode(1), SMALL, CORES)
    assert step_floor_s(decode(64), half, CORES) == step_floor_s(decode(64), SMALL, CORES)
