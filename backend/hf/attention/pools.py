"""The memory of the pages."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from backend.hf.attention import KvGeometry


def kv_pools(
    geometry: KvGeometry, pages: int, page_tokens: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """One tensor a layer, [(pages + 1) * page_tokens, row]: position p of page i is row i *
    page_tokens + p.

    The last page is the spare one, of which no cache knows: padding rows of a graph write there.
    """
    rows = (pages + 1) * page_tokens
    return [_zeros(rows, geometry.row, dtype, device) for _ in range(geometry.layers)]


def _zeros(rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Zeros [rows, width]; never garbage, since a position that is masked out must not be NaN.

    On a CPU the memory comes from calloc, which takes a page of it from the system when it is first
    written. `torch.zeros` writes all of it at once.
    """
    if device != "cpu":
        return torch.zeros(rows, width, dtype=dtype, device=device)
    memory = np.zeros(rows * width * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(rows, width)
