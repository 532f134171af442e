"""How decodes are launched: a plan once a step, then one kernel a layer, both fit for a graph."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from backend.hf.attention.triton_launch import Kernels, LayerCall, StepCache, Tiling, padded
from backend.hf.batch import DecodeRows
from backend.hf.kernels.paged_decode import BLOCK_FIELDS, decode_kernel, plan_kernel

FEW_ROWS = 32  # are cut by themselves; the keys of more are dealt out evenly


@dataclass(frozen=True, slots=True)
class Cutting:
    """How the keys of all rows are dealt out to programs."""

    tiling: Tiling
    programs: int  # a multiprocessor, of all KV heads
    smallest: int | None  # positions of a range that a row is cut into; None: all ranges are even


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The ranges of a step's decodes, and room for the parts of rows that are split."""

    cutting: Cutting
    layer: int  # the first that attends by it
    span: int  # positions of a place
    programs: int  # of a KV head
    blocks: Tensor  # [blocks, BLOCK_FIELDS] int32
    places: Tensor  # [blocks, block // span] int32
    ranges: Tensor  # [programs + 1] int32
    parts_of: Tensor  # [rows, 2] int32
    counters: Tensor  # [rows, kv_heads] int32
    parts: Tensor  # [2 * programs, heads, value_width] float32
    peaks: Tensor  # [2 * programs, heads] float32
    totals: Tensor  # the like


class DecodeAttention:
    """Attends for decodes, into the first rows of the output."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._cuttings = decode_cuttings(kernels)
        self._plans: StepCache[Plan] = StepCache()

    def __call__(self, call: LayerCall, rows: DecodeRows) -> None:
        kernels, window = self._kernels, call.options.window
        plan = self._plans.get(
            rows,
            (window, call.heads),
            call.layer,
            lambda: self._plan(rows, window, call.heads, call.layer),
        )
        tiling, kv_heads = plan.cutting.tiling, kernels.geometry.kv_heads
        decode_kernel[kv_heads, plan.programs](
            call.query, call.pool, plan.blocks, plan.places, plan.ranges, plan.parts_of,
            plan.counters, call.options.sinks, call.output, plan.parts, plan.peaks, plan.totals,
            call.query.stride(0), call.query.stride(1), *call.scaling, int(call.layer > plan.layer),
            *kernels.constants(call), plan.span, call.options.softcap is not None,
            max(tiling.rows, padded(call.heads // kv_heads)), tiling.keys, *kernels.widths,
            kernels.hopper, **tiling.options, launch_pdl=kernels.hopper,
        )  # fmt: skip

    def _plan(self, rows: DecodeRows, window: int | None, heads: int, layer: int) -> Plan:
        geometry, page = self._kernels.geometry, self._kernels.page_tokens
        device = rows.lengths.device
        cutting = next(cut for most, cut in self._cuttings if most is None or rows.count <= most)
        keys, even = cutting.tiling.keys, cutting.smallest is None
        span = gcd(page, keys)
        wanted = max(1, cutting.programs * self._kernels.processors // geometry.kv_heads)
        programs = wanted if even else rows.count + wanted
        seen = rows.bound * page
        if window:
            seen = min(seen, window + span)
        most = rows.count * -(-seen // keys)

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        plan = Plan(
            cutting,
            layer,
            span,
            programs,
            ints(most, BLOCK_FIELDS),
            ints(most, keys // span),
            ints(programs + 1),
            ints(rows.count, 2),
            ints(rows.count, geometry.kv_heads),
            torch.empty(2 * programs, heads, geometry.value_width, device=device),
            *torch.empty(2, 2 * programs, heads, device=device),
        )
        plan_kernel[(rows.count,)](
            rows.lengths, rows.slots, rows.table, rows.table.stride(0),
            plan.blocks, plan.places, plan.ranges, plan.parts_of, plan.counters,
            rows.count, programs, wanted, geometry.kv_heads, window or 0, page, span, keys,
            even, (cutting.smallest or keys) // keys, padded(programs + 1), num_warps=4,
        )  # fmt: skip
        return plan


def decode_cuttings(kernels: Kernels) -> tuple[tuple[int | None, Cutting], ...]:
    """By the most rows that each is for; measured on an H200. To join the parts of a row takes as
    long as to read some hundred positions of it: few rows are cut where that pays, many evenly.
    """
    if kernels.dtype == torch.float32:  # no tensor cores: tiles live in registers
        tiling, few, many = Tiling(16, 32, warps=4, stages=1), 4, 4
    else:  # two programs fit on a multiprocessor, each with a tile on its way
        tiling, few, many = Tiling(16, kernels.keys(128, stages=2), warps=4, stages=3), 1, 2
    return (FEW_ROWS, Cutting(tiling, few, smallest=512)), (None, Cutting(tiling, many, None))
