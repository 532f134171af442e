"""How decodes are launched: a plan once a step, then one kernel a layer, both fit for a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.hf.attention.triton_launch import Kernels, LayerCall, StepCache, Tiling, padded
from backend.hf.batch import DecodeRows
from backend.hf.kernels.paged_decode import PLAN_FIELDS, decode_kernel, plan_kernel


@dataclass(frozen=True, slots=True)
class Cutting:
    """How rows are cut into pieces."""

    tiling: Tiling
    programs: int  # a multiprocessor: pieces of all KV heads make about so many
    smallest: int  # positions of a piece, unless its row is shorter; a multiple of keys


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The pieces of a step's decodes, and room for the parts of those that are split."""

    cutting: Cutting
    programs: int  # of a KV head, one a piece at most
    pieces: Tensor  # [1 + programs, PLAN_FIELDS] int32
    counters: Tensor  # [rows, kv_heads] int32
    parts: Tensor  # [cells, heads, value_width] float32
    peaks: Tensor  # [cells, heads] float32
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
            rows, (window, call.heads), call.layer, lambda: self._plan(rows, window, call.heads)
        )
        tiling, kv_heads = plan.cutting.tiling, kernels.geometry.kv_heads
        decode_kernel[kv_heads, plan.programs](
            call.query, call.pool, rows.table, plan.pieces, plan.counters, call.options.sinks,
            call.output, plan.parts, plan.peaks, plan.totals, call.query.stride(0),
            call.query.stride(1), rows.table.stride(0), *call.scaling, *kernels.constants(call),
            call.options.softcap is not None, max(tiling.rows, padded(call.heads // kv_heads)),
            tiling.keys, *kernels.widths, kernels.hopper, **tiling.options,
            launch_pdl=kernels.hopper,
        )  # fmt: skip

    def _plan(self, rows: DecodeRows, window: int | None, heads: int) -> Plan:
        geometry, device = self._kernels.geometry, rows.lengths.device
        cutting = next(cut for most, cut in self._cuttings if most is None or rows.count <= most)
        wanted = -(-cutting.programs * self._kernels.processors // geometry.kv_heads)
        cells = 2 * wanted
        plan = Plan(
            cutting,
            rows.count + wanted,
            torch.empty(1 + rows.count + wanted, PLAN_FIELDS, dtype=torch.int32, device=device),
            torch.empty(rows.count, geometry.kv_heads, dtype=torch.int32, device=device),
            torch.empty(cells, heads, geometry.value_width, dtype=torch.float32, device=device),
            *torch.empty(2, cells, heads, dtype=torch.float32, device=device),
        )
        plan_kernel[(rows.count,)](
            rows.lengths, rows.slots, plan.pieces, plan.counters,
            rows.count, wanted, geometry.kv_heads,
            window or 0, cutting.smallest, padded(wanted + 1), num_warps=4,
        )  # fmt: skip
        return plan


def decode_cuttings(kernels: Kernels) -> tuple[tuple[int | None, Cutting], ...]:
    """By the most rows that each is for; measured on an H200. To join pieces costs about 4 us, as
    much as 512 positions of one row.
    """
    if kernels.dtype == torch.float32:  # no tensor cores: tiles live in registers
        return ((None, Cutting(Tiling(16, 32, warps=4, stages=1), programs=4, smallest=128)),)
    wide = Tiling(16, kernels.keys(128, stages=3), warps=4, stages=3)
    slim = Tiling(16, kernels.keys(64, stages=5), warps=2, stages=5)
    return (
        (4, Cutting(wide, programs=1, smallest=512)),
        (16, Cutting(slim, programs=1, smallest=512)),
        (None, Cutting(wide, programs=2, smallest=256)),
    )
