"""Tiny models as transformers makes them, and the same models as GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
NUMBERS = {"rope_theta": 50000.0, "rms_norm_eps": 1e-5}
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "1 2"]
ALPHABET = sorted(ByteLevel.alphabet())
TOKENS = ["<|im_start|>", "<|im_end|>", *ALPHABET, *(m.replace(" ", "") for m in MERGES), "<tool>"]
TOKENS += ["[PAD1]", "[PAD2]"]
KINDS = [3, 3, *[1] * (len(ALPHABET) + len(MERGES)), 4, 5, 5]
LETTERS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
PIECES = {
    **{f"self_attn.{name}": source for name, source in LETTERS.items()},
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
}


@dataclass
class TinyModel:
    """A random model of transformers, its weights rounded to bfloat16."""

    architecture: str
    tied: bool = True
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(7)
        config = transformers.AutoConfig.for_model(
            self.architecture,
            **{**WIDTHS, **NUMBERS, **self.config},
            vocab_size=len(TOKENS),
            tie_word_embeddings=self.tied,
        )
        self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in self.model.parameters():  # biases and norms, too, must be told apart
            spread = torch.randn_like(parameter) * 0.1
            parameter.data = (parameter.data + spread).to(torch.bfloat16).float()

    def weights(self) -> dict[str, torch.Tensor]:
        """Float32, under transformers' names; a tied head once."""
        state = dict(self.model.state_dict())
        if self.tied:
            del state["lm_head.weight"]
        return state

    def write(self, path: Path, kind: str = "F32", **metadata: Any) -> Path:
        """The same model as GGUF: rows of q and k in ggml's order for `llama`."""
        writer = gguf.GGUFWriter(path, self.architecture)
        _write_metadata(writer, self.architecture, metadata)
        for name, tensor in self.weights().items():
            array = tensor.numpy()
            if self.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                array = _permuted(array, 4 if "q_proj" in name else 2)
            wanted = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
            data = gguf.quants.quantize(np.ascontiguousarray(array), wanted)
            writer.add_tensor(_gguf_name(name), data, raw_dtype=wanted)
        for name, data in metadata.get("tensors", {}).items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def _gguf_name(name: str) -> str:
    for ours, theirs in PIECES.items():
        name = name.replace(ours, theirs)
    return name


def _permuted(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Row by row, as the format defines it: pair i of a head stands at rows 2i and 2i + 1."""
    half = len(array) // heads // 2
    rows = [
        head * 2 * half + part * half + pair
        for head in range(heads)
        for pair in range(half)
        for part in range(2)
    ]
    return array[rows]


def _write_metadata(writer: gguf.GGUFWriter, name: str, metadata: dict[str, Any]) -> None:
    writer.add_context_length(WIDTHS["max_position_embeddings"])
    writer.add_embedding_length(WIDTHS["hidden_size"])
    writer.add_block_count(metadata.get("layers", WIDTHS["num_hidden_layers"]))
    writer.add_feed_forward_length(WIDTHS["intermediate_size"])
    writer.add_head_count(WIDTHS["num_attention_heads"])
    writer.add_head_count_kv(WIDTHS["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(NUMBERS["rms_norm_eps"])
    writer.add_rope_freq_base(NUMBERS["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(metadata.get("tokens", TOKENS))
    writer.add_token_types(metadata.get("kinds", KINDS))
    writer.add_token_merges(metadata.get("merges", MERGES))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for key, value in metadata.get("integers", {}).items():
        writer.add_uint32(key.format(arch=name), value)
    for key, value in metadata.get("floats", {}).items():
        writer.add_float32(key.format(arch=name), value)
    for key, value in metadata.get("texts", {}).items():
        writer.add_string(key.format(arch=name), value)
    for key, value in metadata.get("flags", {}).items():
        writer.add_bool(key, value)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TinyModel]:
    """Makes the model of an architecture, once for equal arguments without `config`."""
    made: dict[tuple[str, bool], TinyModel] = {}

    def make(architecture: str, tied: bool = True, **config: Any) -> TinyModel:
        if config:
            return TinyModel(architecture, tied, config)
        return made.setdefault((architecture, tied), TinyModel(architecture, tied))

    return make
