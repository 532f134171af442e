"""Architectures with model code of our own, by the name a config.json gives; all others run through
transformers.

A new one is a file with a `shape` function, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from backend.hf.models import ModelConfig, config_value
from backend.hf.models.decoder import DecoderShape

DECODERS: dict[str, str] = {
    "LlamaForCausalLM": "backend.hf.models.llama:shape",
    "MistralForCausalLM": "backend.hf.models.mistral:shape",
    "Qwen2ForCausalLM": "backend.hf.models.qwen2:shape",
    "Qwen3ForCausalLM": "backend.hf.models.qwen3:shape",
}


def decoder_shape(config: ModelConfig) -> DecoderShape | None:
    """The shape of a model that our own decoder runs; None for any other architecture."""
    entry = DECODERS.get(architecture(config))
    if entry is None:
        return None
    module, name = entry.split(":")
    function: Callable[[ModelConfig], DecoderShape] = getattr(import_module(module), name)
    return function(config)


def architecture(config: ModelConfig) -> str:
    """The class name that a config.json gives its model."""
    names: list[str] = config_value(config, "architectures", list, [])
    return str(names[0]) if names else "an unnamed architecture"
