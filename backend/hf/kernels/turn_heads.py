"""Norm of query and key heads, rotation, and the write of keys and values to the pool: one launch.

Moves q, k and v once, writes q and k back and k and v to the pool: (2 * heads + 5 * kv_heads) *
head_dim * itemsize bytes a row, at 16/8 heads of 128 in bf16 1.1 us for 256 rows and 71 us for
16,384 on an H200; launch-bound below that. RMS norm: Zhang and Sennrich 2019; rotary form: Su et
al. 2021, half-split pairs. Reference: `tests/backend/hf/kernels/test_turn_heads.py`.

The kernel is launched before the one that makes qkv has ended (programmatic dependent launch), and
waits for it only after it has read what a step makes first: positions, places and angles. Between
those and the first of its launches stands at least one that waits for all before it, as every
launch of torch's does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.hf.kernels.chip import hopper_or_later
from backend.hf.models.blocks import HeadLayout, Rotation
from backend.hf.models.rope import Rotary

WARP_ELEMENTS = 512  # a warp's share, no less: threads of all programs then sum alike


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of a row a program takes, where there are so many rows or fewer."""

    rows: int
    elements: int
    warps: int


@dataclass(frozen=True, slots=True)
class HeadCut:
    """A cut of a layout: GROUP and BLOCK of `turn_kernel`, groups of a row, and warps."""

    group: int
    block: int
    groups: int
    warps: int


CUTS = (Cut(rows=128, elements=512, warps=1), Cut(rows=1 << 31, elements=2048, warps=4))


@triton.jit(do_not_specialize_on_alignment=["positions", "write_at"])
def turn_kernel(
    qkv,  # [rows, (HEADS + 2 KV_HEADS) * WIDTH]
    table,  # [context, WIDTH] float32: cos, then sin
    positions,  # [rows] int64
    norms,  # [2, WIDTH]: of query heads and of key heads; or None
    epsilon,
    pool,  # [positions, 2 KV_HEADS * WIDTH]
    write_at,  # [rows] int64
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """GROUP heads of one row. Grid [rows, groups]. BLOCK holds half a head."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = WIDTH // 2
    TURNED: tl.constexpr = HEADS + KV_HEADS
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    angle = table + tl.load(positions + row) * WIDTH + column
    cos = tl.load(angle, mask=inside, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=inside, other=0.0)[None, :]
    there = (head < ALL)[:, None] & inside[None, :]
    cell = head[:, None] * WIDTH + column[None, :]
    target = pool + tl.load(write_at + row) * (2 * KV_HEADS * WIDTH) + cell - HEADS * WIDTH
    if norms is not None:
        weight = norms + (head >= HEADS).to(tl.int32)[:, None] * WIDTH + column[None, :]
        low_weight = tl.load(weight, mask=there, other=0.0).to(tl.float32)
        high_weight = tl.load(weight + HALF, mask=there, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    source = qkv + row * (ALL * WIDTH) + cell
    low_bits = tl.load(source, mask=there, other=0.0)
    high_bits = tl.load(source + HALF, mask=there, other=0.0)
    low, high = low_bits.to(tl.float32), high_bits.to(tl.float32)
    if norms is not None:
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / WIDTH + epsilon)[:, None]
        low, high = low * scale * low_weight, high * scale * high_weight
    is_turned = (head < TURNED)[:, None]
    low, high = low * cos - high * sin, high * cos + low * sin
    low_bits = tl.where(is_turned, low.to(low_bits.dtype), low_bits)
    high_bits = tl.where(is_turned, high.to(high_bits.dtype), high_bits)
    tl.store(source, low_bits, mask=there & is_turned)
    tl.store(source + HALF, high_bits, mask=there & is_turned)
    is_kept = there & (head >= HEADS)[:, None]
    tl.store(target, low_bits, mask=is_kept)
    tl.store(target + HALF, high_bits, mask=is_kept)


class PositionTable:
    """The rotation of every position below `context`; see `TurnPositions`. Launches nothing."""

    def __init__(self, rotary: Rotary, context: int, device: str) -> None:
        positions = torch.arange(context, device=device)
        angles = positions[:, None].float() * rotary.frequencies.to(device)
        # [context, head_dim] float32: cos, then sin
        self._table = torch.cat([angles.cos(), angles.sin()], dim=1).mul_(rotary.scale)

    def __call__(self, positions: Tensor) -> Rotation:
        return self._table, positions


class HeadTurner:
    """See `TurnHeads`. Takes the rotations of a `PositionTable`; all tensors are contiguous."""

    def __init__(self, layout: HeadLayout, dtype: torch.dtype, device: str) -> None:
        self._layout = layout
        self._norms: Tensor | None = None  # [2, head_dim]: of query heads and of key heads
        self._epsilon = 0.0
        query, key = layout.query_norm, layout.key_norm
        if query is not None and key is not None:
            self._norms = torch.stack([query.weight, key.weight]).to(device, dtype)
            self._epsilon = query.epsilon
        self._dependent = hopper_or_later(device)
        self._cuts = [(cut.rows, cut_heads(layout, cut)) for cut in CUTS]

    def __call__(self, qkv: Tensor, rotation: Rotation, pool: Tensor, write_at: Tensor) -> None:
        table, positions = rotation
        layout, rows = self._layout, len(qkv)
        cut = next(cut for most, cut in self._cuts if rows <= most)
        turn_kernel[rows, cut.groups](
            qkv, table, positions, self._norms, self._epsilon, pool, write_at,
            layout.heads, layout.kv_heads, layout.head_dim, cut.group, cut.block, self._dependent,
            num_warps=cut.warps, launch_pdl=self._dependent,
        )  # fmt: skip


def cut_heads(layout: HeadLayout, cut: Cut) -> HeadCut:
    """`layout`, cut by `cut`."""
    heads = layout.heads + 2 * layout.kv_heads
    block = 1 << (layout.head_dim // 2 - 1).bit_length()
    most = 1 << (heads - 1).bit_length()
    group = max(min(most, cut.elements // (2 * block)), 1)
    warps = max(min(cut.warps, 2 * block * group // WARP_ELEMENTS), 1)
    return HeadCut(group, block, -(-heads // group), warps)
