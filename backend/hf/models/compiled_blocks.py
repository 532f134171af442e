"""What stands between the products of a decoder layer compiled by torch: on CUDA Inductor's kernels
instead of ours, on a CPU its C++. The products stay torch's own.

A function is compiled at its first call, once more for any number of rows and once for one row:
seconds each, in the first steps.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.hf.models.blocks import HeadLayout, Norm, Rotation, TurnHeads
from backend.hf.models.torch_blocks import Between, TorchBlocks, gate, rms_norm
from backend.hf.precision import Precision
from backend.interface import Unsupported

logger = logging.getLogger(__name__)


def compiled_blocks(precision: Precision, device: str) -> TorchBlocks:
    """`Blocks` of compiled functions. Raises Unsupported where torch.compile lacks its compiler."""
    missing = compiler_lack(device)
    if missing is not None:
        raise Unsupported(f"COMPILE_MODEL=1 cannot run here, as {missing}: use COMPILE_MODEL=0")
    logger.info("COMPILE_MODEL=1: the first steps wait for torch.compile")
    # fullgraph: a function that torch would run uncompiled is an error instead
    turn = torch.compile(turn_heads, fullgraph=True)

    def turner(layout: HeadLayout, norm: Norm | None) -> TurnHeads:
        return lambda *arguments: turn(layout, norm, *arguments)

    between = Between(
        norm=torch.compile(rms_norm, fullgraph=True),
        gate=torch.compile(gate, fullgraph=True),
        turner=turner,
    )
    return TorchBlocks(precision, device, between)


def compiler_lack(device: str) -> str | None:
    """What torch.compile would miss on `device`, in one clause. None: nothing."""
    if device == "cuda":
        return "triton is not installed" if find_spec("triton") is None else None
    if device != "cpu":
        return f"DEVICE is {device}"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler} (CXX names another)"
    return None


def turn_heads(
    layout: HeadLayout,
    norm: Norm | None,
    qkv: Tensor,
    rotation: Rotation,
    pool: Tensor,
    write_at: Tensor,
) -> None:
    """What `HeadTurner` does, without the operations in place that torch cannot trace."""
    heads = qkv.view(len(qkv), layout.heads + 2 * layout.kv_heads, layout.head_dim)
    turned = heads[:, : layout.heads + layout.kv_heads]
    normed = turned
    if norm is not None:
        normed = F.rms_norm(turned, (layout.head_dim,), None, norm.epsilon) * norm.weight
    cos, sin = rotation
    turned.copy_(normed * cos + normed.roll(layout.head_dim // 2, -1) * sin)
    pool.index_copy_(0, write_at, qkv[:, layout.heads * layout.head_dim :])
