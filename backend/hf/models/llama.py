"""Llama 2 and 3, and every checkpoint that calls itself LlamaForCausalLM."""

from __future__ import annotations

from dataclasses import replace

from backend.hf.models import ModelConfig
from backend.hf.models.decoder import DecoderShape, base_shape


def shape(config: ModelConfig) -> DecoderShape:
    """What a Llama config.json says."""
    bias = config.get("attention_bias", False)
    return replace(
        base_shape(config),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.get("mlp_bias", False),
    )
