"""Qwen2 and Qwen2.5: biases on query, key and value; optionally a sliding window in the upper
layers.
"""

from __future__ import annotations

from dataclasses import replace

from backend.hf.models import ModelConfig, config_value
from backend.hf.models.decoder import DecoderShape, base_shape, sliding_window
from backend.interface import ModelBroken


def shape(config: ModelConfig) -> DecoderShape:
    """What a Qwen2 config.json says."""
    base = base_shape(config)
    return replace(base, qkv_bias=True, windows=windows(config, base.layers))


def windows(config: ModelConfig, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: by `layer_types` where given, else in layers from
    `max_window_layers` on. Raises ModelBroken when they are not as many as there are layers.
    """
    window = (
        sliding_window(config) if config_value(config, "use_sliding_window", bool, False) else None
    )
    first = config_value(config, "max_window_layers", int, 28)
    by_index = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    kinds = config_value(config, "layer_types", list, by_index)
    if len(kinds) != layers:
        raise ModelBroken(
            f"config.json: layer_types must be one for each of {layers} layers, has {len(kinds)}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
