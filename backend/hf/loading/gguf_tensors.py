"""The tensors of a GGUF under the names, in the shapes and in the row order of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gguf.quants import dequantize
from torch import Tensor

from backend.hf.loading.gguf_config import ARCHITECTURES, ROPE_FACTORS
from backend.hf.loading.gguf_file import GgufFile
from backend.hf.models import ModelConfig
from backend.interface import ModelBroken, Unsupported

CHUNK_ELEMENTS = 1 << 22  # dequantized at once: 16 MB of float32, whatever the tensor's size


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the target and where it comes from."""

    source: str  # in the GGUF
    name: str  # in the Hugging Face folder
    shape: tuple[int, ...]
    permuted_heads: int = 0  # rows stand in ggml's rotary order, in this many heads; 0: as they are

    @property
    def bytes(self) -> int:
        """Of the target."""
        return 2 * math.prod(self.shape)


def tensor_entries(file: GgufFile, config: ModelConfig) -> list[TensorEntry]:
    """Every tensor of the model, layer by layer.

    Raises ModelBroken when one is missing or of another shape, Unsupported when the file holds one
    that its architecture has no place for.
    """
    entries = []
    for entry in _expected(file, config):
        there = file.shape(entry.source)
        if there != entry.shape:
            raise ModelBroken(
                f"{file.path}: tensor {entry.source} must be {list(entry.shape)}, "
                f"has {'nothing' if there is None else list(there)}"
            )
        entries.append(entry)
    unknown = file.tensors.keys() - {entry.source for entry in entries} - {ROPE_FACTORS}
    if unknown:
        raise Unsupported(
            f"{file.path}: tensor {min(unknown)} has no place in a {config['model_type']} model "
            f"({len(unknown)} such)"
        )
    return entries


def _expected(file: GgufFile, config: ModelConfig) -> Iterator[TensorEntry]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield TensorEntry("token_embd.weight", "model.embed_tokens.weight", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        for entry in _layer(file, config):
            yield TensorEntry(
                f"blk.{layer}.{entry.source}",
                f"model.layers.{layer}.{entry.name}",
                entry.shape,
                entry.permuted_heads,
            )
    yield TensorEntry("output_norm.weight", "model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        yield TensorEntry("output.weight", "lm_head.weight", (vocabulary, hidden))


def _layer(file: GgufFile, config: ModelConfig) -> Iterator[TensorEntry]:
    """The tensors of one layer, without the layer's prefix."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config["head_dim"]
    architecture = ARCHITECTURES[config["model_type"]]
    heads = {
        "q": config["num_attention_heads"],
        "k": config["num_key_value_heads"],
        "v": config["num_key_value_heads"],
    }
    yield TensorEntry("attn_norm.weight", "input_layernorm.weight", (hidden,))
    for letter, count in heads.items():
        source, name = f"attn_{letter}", f"self_attn.{letter}_proj"
        permuted = count if architecture.permuted and letter != "v" else 0
        yield TensorEntry(f"{source}.weight", f"{name}.weight", (count * width, hidden), permuted)
        if architecture.biases:
            yield TensorEntry(f"{source}.bias", f"{name}.bias", (count * width,), permuted)
        if architecture.head_norms and letter != "v":
            yield TensorEntry(f"{source}_norm.weight", f"self_attn.{letter}_norm.weight", (width,))
    yield TensorEntry("attn_output.weight", "self_attn.o_proj.weight", (hidden, heads["q"] * width))
    yield TensorEntry("ffn_norm.weight", "post_attention_layernorm.weight", (hidden,))
    yield TensorEntry("ffn_gate.weight", "mlp.gate_proj.weight", (inner, hidden))
    yield TensorEntry("ffn_up.weight", "mlp.up_proj.weight", (inner, hidden))
    yield TensorEntry("ffn_down.weight", "mlp.down_proj.weight", (hidden, inner))


def read_tensor(file: GgufFile, entry: TensorEntry) -> Tensor:
    """The tensor in bfloat16, dequantized slice by slice so that float32 never holds all of it.

    Raises Unsupported for a type that the `gguf` package cannot dequantize.
    """
    source = file.tensors[entry.source]
    values = torch.empty(entry.shape, dtype=torch.bfloat16)
    rows = max(1, CHUNK_ELEMENTS // entry.shape[-1]) if len(entry.shape) > 1 else entry.shape[0]
    for start in range(0, entry.shape[0], rows):
        try:
            part = dequantize(source.data[start : start + rows], source.tensor_type)
        except NotImplementedError as error:
            raise Unsupported(
                f"{file.path}: tensor {entry.source} is {source.tensor_type.name}, a type that "
                "the gguf package cannot dequantize"
            ) from error
        values[start : start + rows] = torch.from_numpy(part.copy())
    return _unpermute(values, entry.permuted_heads) if entry.permuted_heads else values


def _unpermute(values: Tensor, heads: int) -> Tensor:
    """Rows of q or k from ggml's rotary pairs (0, 1), (2, 3) ... back to half-split pairs (0, d/2),
    (1, d/2 + 1) ... within each head.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape).contiguous()
