"""Rotary position embedding (Su et al. 2021), half-split pairs, and the scalings that stretch it to
longer contexts.

linear: Chen et al. 2023. llama3: Llama 3.1's published rule. yarn: Peng et al. 2023. A kind that
changes frequencies with the length of the sequence (dynamic, longrope) is refused: keys already in
the cache were rotated by other angles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backend.hf.models import ModelConfig, config_value, positive
from backend.interface import Unsupported

Parameters = dict[str, Any]


def rope_parameters(config: ModelConfig) -> Parameters:
    """The rotary part of a config.json, in the form of transformers 5 (`rope_parameters`) or before
    it (`rope_scaling`).
    """
    older: Parameters = config_value(config, "rope_scaling", dict, {})
    found = dict(config_value(config, "rope_parameters", dict, {}) or older)
    found.setdefault("rope_theta", positive(config, "rope_theta", float, 10_000.0))
    found.setdefault("rope_type", found.pop("type", "default"))
    return found


def _plain(parameters: Parameters, width: int) -> Tensor:
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / (positive(parameters, "rope_theta", float) ** exponents)


def _default(parameters: Parameters, width: int, config: ModelConfig) -> tuple[Tensor, float]:
    return _plain(parameters, width), 1.0


def _linear(parameters: Parameters, width: int, config: ModelConfig) -> tuple[Tensor, float]:
    return _plain(parameters, width) / positive(parameters, "factor", float), 1.0


def _llama3(parameters: Parameters, width: int, config: ModelConfig) -> tuple[Tensor, float]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    frequencies = _plain(parameters, width)
    original = positive(parameters, "original_max_position_embeddings", float)
    low = positive(parameters, "low_freq_factor", float)
    high = positive(parameters, "high_freq_factor", float)
    turns = original * frequencies / (2 * math.pi)  # over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / positive(parameters, "factor", float)), 1.0


def _yarn(parameters: Parameters, width: int, config: ModelConfig) -> tuple[Tensor, float]:
    """Interpolates what turns less than `beta_slow` times, keeps what turns more than `beta_fast`,
    and sharpens attention.
    """
    frequencies = _plain(parameters, width)
    context = positive(config, "max_position_embeddings", float)
    original = positive(parameters, "original_max_position_embeddings", float, context)
    factor = positive(parameters, "factor", float, context / original)
    base = positive(parameters, "rope_theta", float)

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(positive(parameters, "beta_fast", float, 32.0))
    high = dimension(positive(parameters, "beta_slow", float, 1.0))
    if config_value(parameters, "truncate", bool, True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor), _yarn_sharpness(parameters, factor)


def _yarn_sharpness(parameters: Parameters, factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return positive(parameters, "attention_factor", float)
    scale = config_value(parameters, "mscale", float, 0.0)
    scale_all = config_value(parameters, "mscale_all_dim", float, 0.0)
    if scale and scale_all:
        return _logarithmic(factor, scale) / _logarithmic(factor, scale_all)
    return _logarithmic(factor, 1.0)


def _logarithmic(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


ROPE_TYPES: dict[str, Callable[[Parameters, int, ModelConfig], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


@dataclass(frozen=True, eq=False, slots=True)
class Rotary:
    """Angles of one model: position * frequency, for each pair of a head's halves."""

    frequencies: Tensor  # [head_dim / 2] float32, on the CPU
    scale: float  # on cos and sin


def read_rotary(config: ModelConfig, head_dim: int) -> Rotary:
    """What a config.json says. Raises Unsupported for a scaling that is not served."""
    parameters = rope_parameters(config)
    kind = config_value(parameters, "rope_type", str)
    if kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise Unsupported(f"rope scaling {kind!r} is not among those served ({known})")
    return Rotary(*ROPE_TYPES[kind](parameters, head_dim, config))
