"""Qwen3, dense: a norm on each query and key head instead of Qwen2's biases."""

from __future__ import annotations

from dataclasses import replace

from backend.hf.models import ModelConfig, config_value
from backend.hf.models.decoder import DecoderShape, base_shape
from backend.hf.models.qwen2 import windows


def shape(config: ModelConfig) -> DecoderShape:
    """What a Qwen3 config.json says."""
    base = base_shape(config)
    bias = config_value(config, "attention_bias", bool, False)
    return replace(
        base,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        windows=windows(config, base.layers),
    )
