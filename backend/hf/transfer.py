"""Small values on their way to the device and back, without a wait for what runs there.

Copies go through pinned memory in the order of the stream; torch keeps a pinned block until the
copy that reads it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: Sequence[Any] | np.ndarray[Any, Any],
    device: torch.device | str,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """A tensor of `values` that operations queued from now on see."""
    host = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` as it is when the operations queued so far are done: to be read after a wait."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
