"""Small values on their way to the device and back, without a wait for what runs there.

Copies go through pinned memory in the order of the stream; torch keeps a pinned block until the
copy that reads it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

HostValues: TypeAlias = "Sequence[Any] | np.ndarray[Any, Any]"


def to_device(
    values: HostValues, device: torch.device | str, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A tensor of `values` that operations queued from now on see."""
    host = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def stacked(arrays: Sequence[np.ndarray[Any, Any]], device: torch.device) -> Tensor:
    """Arrays of one shape as the rows of a tensor, that operations queued from now on see."""
    rows = torch.from_numpy(np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype))
    if device.type == "cuda":
        rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    np.stack(arrays, out=rows.numpy())
    return rows.to(device, non_blocking=True)


def send(values: HostValues, target: Tensor) -> None:
    """Put `values` into `target`, of the same shape, for operations queued from now on."""
    host = torch.as_tensor(values, dtype=target.dtype)
    if target.device.type == "cuda":
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` as it is when the operations queued so far are done: to be read after a wait."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
