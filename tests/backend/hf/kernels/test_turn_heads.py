"""`HeadTurner` against norm and rotation in float64, and against itself in other batches.

What no row owns is NaN: the pool, and memory around qkv.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.hf.models.blocks import HeadLayout, Norm
from backend.hf.models.rope import Rotary
from backend.hf.models.torch_blocks import PositionTurner

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CONTEXT = 5000
EPSILON = 1e-6
SPARE = 3  # rows of the pool, for each that is written


@dataclass(frozen=True, slots=True)
class Case:
    """What the kernel is compiled for."""

    dtype: torch.dtype = torch.bfloat16
    heads: int = 16
    kv_heads: int = 8
    width: int = 128
    normed: bool = True
    scale: float = 1.0  # on cos and sin

    def layout(self) -> HeadLayout:
        if not self.normed:
            return HeadLayout(self.heads, self.kv_heads, self.width)
        query, key = (1 + torch.randn(self.width, device=DEVICE) / 4 for _ in range(2))
        norms = (Norm(weight.to(self.dtype), EPSILON) for weight in (query, key))
        return HeadLayout(self.heads, self.kv_heads, self.width, *norms)

    def rotary(self) -> Rotary:
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32) / self.width
        return Rotary(1.0 / 10_000**exponents, self.scale)


CASES = {
    "bf16": Case(),
    "fp16": Case(torch.float16),
    "fp32": Case(torch.float32),
    "no norms": Case(normed=False),
    "no norms, fp32": Case(torch.float32, normed=False),
    "scaled angles": Case(scale=1.25),
    "odd heads of 64": Case(heads=9, kv_heads=3, width=64),
    "one kv head of 8": Case(torch.float32, heads=5, kv_heads=1, width=8),
    "heads of 8": Case(heads=6, kv_heads=2, width=8),
    "heads of 80": Case(heads=7, kv_heads=7, width=80),
    "heads of 96, fp32": Case(torch.float32, heads=6, kv_heads=2, width=96),
    "heads of 256": Case(heads=8, kv_heads=2, width=256),
}


class Step:
    """Random rows of a case at random positions, to be written to random places of a pool."""

    def __init__(self, case: Case, rows: int) -> None:
        torch.manual_seed(rows)
        self.case = case
        self.layout = case.layout()
        heads = case.heads + 2 * case.kv_heads
        self.qkv = (torch.randn(rows, heads * case.width, device=DEVICE) * 3).to(case.dtype)
        self.positions = torch.randint(CONTEXT, (rows,), device=DEVICE)
        self.write_at = torch.randperm(SPARE * rows, device=DEVICE)[:rows]
        module = import_module("backend.hf.kernels.turn_heads")
        self.table: Any = module.PositionTable(case.rotary(), CONTEXT, DEVICE)
        self.turner: Any = module.HeadTurner(self.layout, case.dtype, DEVICE)

    def turned(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """qkv and pool after the rows `chosen` alone were turned."""
        case = self.case
        memory = self.qkv.new_full((len(chosen) + 2, self.qkv.shape[1]), torch.nan)
        qkv = memory[1:-1]
        qkv.copy_(self.qkv[chosen])
        pool = qkv.new_full((SPARE * len(self.qkv), 2 * case.kv_heads * case.width), torch.nan)
        self.turner(qkv, self.table(self.positions[chosen]), pool, self.write_at[chosen])
        assert memory[[0, -1]].isnan().all()
        return qkv, pool

    def expected(self) -> Tensor:
        """Query and key heads, normed and rotated: [rows, heads + kv_heads, width] float64."""
        case, layout = self.case, self.layout
        heads = self.qkv.double().view(len(self.qkv), -1, case.width)
        heads = heads[:, : case.heads + case.kv_heads]
        if layout.query_norm is not None and layout.key_norm is not None:
            heads = heads / (heads.square().mean(-1, keepdim=True) + EPSILON).sqrt()
            heads[:, : case.heads] *= layout.query_norm.weight.double()
            heads[:, case.heads :] *= layout.key_norm.weight.double()
        frequencies = case.rotary().frequencies.to(DEVICE)
        angles = (self.positions[:, None].float() * frequencies).double()
        turns = torch.polar(torch.full_like(angles, case.scale), angles)[:, None]
        pairs = torch.complex(*heads.chunk(2, dim=-1)) * turns
        return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 3, 150])
def test_heads_are_normed_and_rotated_and_kept(name: str, rows: int) -> None:
    step = Step(CASES[name], rows)
    case = step.case
    turned = (case.heads + case.kv_heads) * case.width
    qkv, pool = step.turned(torch.arange(rows, device=DEVICE))
    right = step.expected().flatten(1)
    rounding = torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 2e-6
    torch.testing.assert_close(qkv[:, :turned].double(), right, rtol=rounding, atol=1e-5)
    assert torch.equal(qkv[:, turned:], step.qkv[:, turned:])
    assert torch.equal(pool[step.write_at], qkv[:, case.heads * case.width :])
    rest = torch.ones(len(pool), dtype=torch.bool, device=DEVICE)
    rest[step.write_at] = False
    assert pool[rest].isnan().all()


@pytest.mark.parametrize("name", ["bf16", "fp32", "heads of 8", "heads of 96, fp32"])
def test_a_row_has_the_same_bits_in_every_batch(name: str) -> None:
    step = Step(CASES[name], 400)
    everything, _ = step.turned(torch.arange(400, device=DEVICE))
    for count in (1, 2, 64, 129):
        chosen = torch.randperm(400, device=DEVICE)[:count]
        assert torch.equal(step.turned(chosen)[0], everything[chosen])


def test_angles_are_those_of_the_reference() -> None:
    step = Step(replace(CASES["fp32"], scale=0.875), 300)
    table, positions = step.table(step.positions)
    cos, sin = PositionTurner(step.case.rotary(), torch.float32, DEVICE)(step.positions)
    half = step.case.width // 2  # the reference has each angle twice, and a sign on the first sin
    right = torch.cat([cos[:, 0, :half], sin[:, 0, half:]], dim=-1)
    assert torch.equal(table[positions], right)
    assert positions is step.positions


def test_launches_of_a_graph_wait_for_each_other() -> None:
    step = Step(CASES["bf16"], 5)
    rotation = step.table(step.positions)
    pool = step.qkv.new_full((SPARE * 5, 2 * 8 * 128), torch.nan)
    right = step.qkv.clone()
    for _ in range(20):
        step.turner(right, rotation, pool, step.write_at)
        torch.cuda.synchronize()
    graph, qkv = torch.cuda.CUDAGraph(), step.qkv.clone()
    with torch.cuda.graph(graph):
        for _ in range(20):
            step.turner(qkv, rotation, pool, step.write_at)
    for _ in range(50):
        qkv.copy_(step.qkv)
        graph.replay()
        assert torch.equal(qkv, right)


def test_a_pool_has_more_elements_than_32_bits_count() -> None:
    step = Step(CASES["bf16"], 4)
    width = 2 * 8 * 128
    pool = torch.empty((1 << 31) // width + 1000, width, dtype=torch.bfloat16, device=DEVICE)
    write_at = torch.tensor([len(pool) - 1, 7, (1 << 31) // width, 500], device=DEVICE)
    qkv = step.qkv.clone()
    step.turner(qkv, step.table(step.positions), pool, write_at)
    assert torch.equal(pool[write_at], qkv[:, 16 * 128 :])
