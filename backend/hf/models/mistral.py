"""Mistral: Llama with a sliding window in every layer, in its first release."""

from __future__ import annotations

from dataclasses import replace

from backend.hf.models import ModelConfig
from backend.hf.models.decoder import DecoderShape, base_shape, sliding_window


def shape(config: ModelConfig) -> DecoderShape:
    """What a Mistral config.json says."""
    base = base_shape(config)
    return replace(base, windows=(sliding_window(config),) * base.layers)
