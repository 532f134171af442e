"""Qwen2 and Qwen2.5: biases on query, key and value; optionally a sliding window in the upper
layers.
"""

from __future__ import annotations

from dataclasses import replace

from backend.hf.models import ModelConfig
from backend.hf.models.decoder import DecoderShape, base_shape


def shape(config: ModelConfig) -> DecoderShape:
    """What a Qwen2 config.json says."""
    base = base_shape(config)
    return replace(base, qkv_bias=True, windows=windows(config, base.layers))


def windows(config: ModelConfig, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types` where given, else in layers from
    `max_window_layers` on.
    """
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or [
        "sliding_attention" if index >= config.get("max_window_layers", 28) else "full_attention"
        for index in range(layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
