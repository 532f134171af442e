"""Llama 2 and 3, and every checkpoint that calls itself LlamaForCausalLM."""

from __future__ import annotations

from dataclasses import replace

from backend.hf.models import ModelConfig, config_value
from backend.hf.models.decoder import DecoderShape, base_shape


def shape(config: ModelConfig) -> DecoderShape:
    """What a Llama config.json says."""
    bias = config_value(config, "attention_bias", bool, False)
    return replace(
        base_shape(config),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config_value(config, "mlp_bias", bool, False),
    )
