"""config.json and generation_config.json from the metadata of a GGUF."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.hf.loading.gguf_file import GgufFile
from backend.hf.models import ModelConfig
from backend.interface import ModelBroken, Unsupported

ROPE_FACTORS = "rope_freqs.weight"  # tensor: what each rotary frequency is divided by
END_TOKENS = ("eos", "eot", "eom")  # of text, of turn, of message
# Control tokens that end an answer in every vocabulary that has them; files often name only one.
END_NAMES = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>")
CONTROL = 3  # in tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a GGUF architecture maps to transformers' class of the same family."""

    model_class: str
    permuted: bool = False  # rows of q and k stand in ggml's rotary order
    biases: bool = False  # on q, k and v
    head_norms: bool = False  # RMSNorm on q and k


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", permuted=True),  # Mistral's files, too
    "qwen2": Architecture("Qwen2ForCausalLM", biases=True),
    "qwen3": Architecture("Qwen3ForCausalLM", head_norms=True),
}


def model_config(file: GgufFile) -> ModelConfig:
    """The model as config.json.

    Raises Unsupported for an architecture or option that has no equal there.
    """
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise Unsupported(
            f"{file.path} has architecture {name!r}: from GGUF only {', '.join(ARCHITECTURES)} run"
        )
    hidden = file.get(f"{name}.embedding_length", int)
    heads = file.get(f"{name}.attention.head_count", int)
    embedding = file.shape("token_embd.weight")
    if not embedding or min(hidden, heads) < 1:
        raise ModelBroken(f"{file.path} has no token_embd.weight, no width or no attention heads")
    head_dim = file.get(f"{name}.attention.key_length", int, hidden // heads)
    _refuse_options(file, name, head_dim)
    return {
        "architectures": [ARCHITECTURES[name].model_class],
        "model_type": name,
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": file.get(f"{name}.feed_forward_length", int),
        "num_hidden_layers": file.get(f"{name}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{name}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.get(f"{name}.context_length", int),
        "rms_norm_eps": file.real(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.real(f"{name}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, name),
        "tie_word_embeddings": file.shape("output.weight") is None,
        "torch_dtype": "bfloat16",
        **token_ids(file),
    }


def _refuse_options(file: GgufFile, name: str, head_dim: int) -> None:
    """Raise Unsupported for metadata that would change the arithmetic and is not carried over."""
    honoured: dict[str, int] = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "expert_count": 0,
        "attention.sliding_window": 0,
    }
    for key, wanted in honoured.items():
        there = file.get(f"{name}.{key}", int, wanted)
        if there != wanted:
            raise Unsupported(
                f"{file.path}: {name}.{key} is {there}, only {wanted} runs: "
                "use the model's safetensors"
            )


def token_ids(file: GgufFile) -> dict[str, int]:
    """The ids of the special tokens, under config.json's names."""
    sources = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        f"{name}_token_id": file.get(f"tokenizer.ggml.{source}_token_id", int)
        for name, source in sources.items()
        if file.has(f"tokenizer.ggml.{source}_token_id")
    }


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The model's own generation defaults: first and end tokens."""
    ids = token_ids(file)
    ids.pop("unk_token_id", None)
    named = [f"tokenizer.ggml.{name}_token_id" for name in END_TOKENS]
    ends = [file.get(key, int) for key in named if file.has(key)]
    tokens = file.get("tokenizer.ggml.tokens", list, [])
    kinds = file.get("tokenizer.ggml.token_type", list, [])
    ends += [
        id
        for id, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == CONTROL and text in END_NAMES
    ]
    return {**ids, "eos_token_id": list(dict.fromkeys(ends))} if ends else dict(ids)


def _rope_scaling(file: GgufFile, name: str) -> dict[str, Any] | None:
    prefix = f"{name}.rope.scaling"
    kind = file.get(f"{prefix}.type", str, "none")
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, name, kind)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise Unsupported(f"{file.path}: {prefix}.type {kind!r}, only linear and yarn run")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": file.real(f"{prefix}.factor")}
    carried = {f"{prefix}.{key}" for key in ("type", "factor", "finetuned")}
    if kind == "yarn":
        original = f"{prefix}.original_context_length"
        scaling["original_max_position_embeddings"] = file.get(original, int)
        carried.add(original)
        for key in ("beta_fast", "beta_slow"):
            if file.has(f"{prefix}.yarn_{key}"):
                scaling[key] = file.real(f"{prefix}.yarn_{key}")
                carried.add(f"{prefix}.yarn_{key}")
    other = file.keys_under(prefix) - carried
    if other:
        raise Unsupported(f"{file.path}: {min(other)} is not honoured: use the model's safetensors")
    return scaling


def _llama3_scaling(file: GgufFile, name: str, kind: str) -> dict[str, Any]:
    """Llama 3.1's scaling, stored as one factor a frequency, back in its parameters.

    All released models use these bounds; the factor is the largest one. Raises Unsupported unless
    they give the stored factors.
    """
    stored = np.asarray(file.tensors[ROPE_FACTORS].data, dtype=np.float32)
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = file.real(f"{name}.rope.freq_base", 10000.0)
    made = np.array(llama3_factors(base, 2 * len(stored), scaling), dtype=np.float32)
    if kind != "none" or not np.allclose(made, stored, rtol=1e-5, atol=0):
        raise Unsupported(
            f"{file.path}: {ROPE_FACTORS} is no llama3 scaling: use the model's safetensors"
        )
    return scaling


def llama3_factors(base: float, width: int, scaling: dict[str, Any]) -> list[float]:
    """What each of the width / 2 rotary frequencies is divided by (Llama 3.1's model card):
    nothing for short wavelengths, `factor` for long ones, a blend between.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for pair in range(width // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / width)
        turns = scaling["original_max_position_embeddings"] / wavelength
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return factors
