"""What our launches ask of the chip."""

from __future__ import annotations

import torch


def hopper_or_later(device: torch.device | str) -> bool:
    """Whether the chip starts a launch before the one ahead of it has ended (programmatic dependent
    launch), and has a tensor memory accelerator.
    """
    if torch.device(device).type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
