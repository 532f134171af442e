"""What a grammar allows each row to draw: packed on the host, unpacked where the logits are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from backend.hf.transfer import to_device
from backend.interface import TokenMask

SLICE = 16  # rows at a time: what is unpacked is as large as their logits


def pack(masks: Sequence[TokenMask], device: torch.device) -> Tensor:
    """Masks on their way to `device`, [masks, bytes] uint8."""
    return to_device(np.stack(masks).view(np.uint8), device, torch.uint8)


def forbid(logits: Tensor, packed: Tensor) -> None:
    """Set to -inf what is not in the masks [rows, bytes] of `logits` [rows, vocabulary] float32, in
    place.
    """
    table = _added(logits.device)
    for start in range(0, len(logits), SLICE):
        rows, masks = logits[start : start + SLICE], packed[start : start + SLICE]
        # a tenth of the time that masked_fill takes on a CPU
        added = table.index_select(0, masks.flatten().int()).view(len(rows), -1)
        rows += added[:, : rows.shape[1]]


@lru_cache
def _added(device: torch.device) -> Tensor:
    """What each byte of a mask adds to eight logits, [256, 8] float32: 0, or -inf. Bit i is the
    i-th of them, as the words of a mask are little-endian.
    """
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return torch.where(bits == 1, 0.0, -math.inf)
