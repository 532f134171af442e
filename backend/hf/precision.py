"""In which number formats a model is held and computed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from backend.interface import Unsupported

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Precision:
    """`weights`: format of the matrices in memory; `compute`: of activations and KV cache."""

    weights: torch.dtype
    compute: torch.dtype


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(torch.float32, torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
    "float16": Precision(torch.float16, torch.float16),
}

# Half-precision weights multiplied in float32 (FBGEMM): most processors have no float16 arithmetic
# worth using, but reading half the bytes is what a decode step is made of.
CPU_HALF = Precision(torch.float16, torch.float32)


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AVX512-BF16, AMX or the like)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_has_half_weights() -> bool:
    """Whether this build of torch has FBGEMM's products with float16 weights."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def choose_precision(name: str, device: str) -> Precision:
    """The precision that `DTYPE` names; `auto` takes the fastest that keeps the checkpoint's bits,
    and says so.
    """
    if name == "auto":
        name, reason = _fastest(device)
        logger.info("DTYPE=auto: %s, %s", name, reason)
    if name == "float16" and device == "cpu":
        if not cpu_has_half_weights():
            raise Unsupported(
                "DTYPE=float16 on a CPU needs FBGEMM, which this torch lacks: use float32"
            )
        return CPU_HALF
    return PRECISIONS[name]


def _fastest(device: str) -> tuple[str, str]:
    if device != "cpu":
        return "bfloat16", "the checkpoint's own format"
    if cpu_has_bfloat16():
        return "bfloat16", "which this processor multiplies in hardware"
    if cpu_has_half_weights():
        return "float16", "weights only, as this processor has no bfloat16 arithmetic"
    return "float32", "as this processor has no arithmetic of 16 bits"
