"""The decoder that Llama and its relatives share: pre-norm, rotary attention with grouped queries,
gated SiLU feed-forward.

A family's own file turns its config.json into a `DecoderShape`; nothing here knows a family's name.
Weights are read under the names that Hugging Face checkpoints of all these families use. Query, key
and value are one product, and so are gate and up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.hf.attention import AttentionOptions, KvGeometry, PagedAttention
from backend.hf.batch import ForwardBatch
from backend.hf.models import ModelConfig, WeightSource, config_value, positive
from backend.hf.models.linear import Linear, LinearFactory
from backend.hf.models.rope import Rotary, Rotation, rotate
from backend.hf.precision import Precision
from backend.interface import ModelBroken, Unsupported


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What tells one model of the family from another."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    tied: bool  # the head reads the embedding table
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # of each layer; empty: all of them see everything


def base_shape(config: ModelConfig) -> DecoderShape:
    """What every family's config.json spells alike; a family replaces the rest.

    Raises Unsupported for a feed-forward that this decoder does not compute, ModelBroken for a key
    that is missing or makes no sense.
    """
    activation = config_value(config, "hidden_act", str, "silu")
    if activation != "silu":
        raise Unsupported(f"hidden_act {activation!r} is not served, silu is")
    hidden = positive(config, "hidden_size", int)
    heads = positive(config, "num_attention_heads", int)
    kv_heads = positive(config, "num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise ModelBroken(
            f"config.json: num_attention_heads must be a multiple of num_key_value_heads, "
            f"has {heads} and {kv_heads}"
        )
    return DecoderShape(
        layers=positive(config, "num_hidden_layers", int),
        hidden=hidden,
        intermediate=positive(config, "intermediate_size", int),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=positive(config, "head_dim", int, hidden // heads),
        vocabulary=positive(config, "vocab_size", int),
        epsilon=config_value(config, "rms_norm_eps", float, 1e-6),
        tied=config_value(config, "tie_word_embeddings", bool, False),
    )


def sliding_window(config: ModelConfig) -> int | None:
    """Tokens that a layer with a window sees; None when the config.json gives no window."""
    if config.get("sliding_window") is None:
        return None
    return positive(config, "sliding_window", int)


class WeightReader:
    """Reads one model's tensors, fused where the decoder wants them so, in the precision it runs
    in.
    """

    def __init__(self, source: WeightSource, precision: Precision, device: str) -> None:
        self._source = source
        self._precision = precision
        self._device = device
        self.factory = LinearFactory(precision, device)

    def vector(self, name: str, width: int) -> Tensor:
        """A norm's weight [width]."""
        return self._source.read(name, (width,)).to(self._device, self._precision.compute)

    def table(self, name: str, rows: int, width: int) -> Tensor:
        """An embedding table [rows, width], kept in 16 bits where the weights are: rows are widened
        as they are read.
        """
        table = self._source.read(name, (rows, width))
        self.factory.parameters += table.numel()
        wide = self._precision.weights == torch.float32
        return table.to(self._device, torch.float32 if wide else table.dtype)

    def linear(self, names: dict[str, int], width: int, bias: bool) -> Linear:
        """The product of several weights stacked: `names` maps a module's name to its rows."""
        weights = [
            self._source.read(f"{name}.weight", (rows, width)) for name, rows in names.items()
        ]
        biases = [
            self._source.read(f"{name}.bias", (rows,)) for name, rows in names.items() if bias
        ]
        return self.factory.make(torch.cat(weights), torch.cat(biases) if biases else None)


class Layer:
    """One block: attention, then feed-forward, each added to the residual stream."""

    def __init__(
        self, index: int, shape: DecoderShape, reader: WeightReader, window: int | None
    ) -> None:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._index = index
        self._shape = shape
        self._options = AttentionOptions(scale=shape.head_dim**-0.5, window=window)
        self._input_norm = reader.vector(f"{prefix}.input_layernorm.weight", shape.hidden)
        self._qkv = reader.linear(
            {
                f"{attention}.q_proj": queries,
                f"{attention}.k_proj": keys,
                f"{attention}.v_proj": keys,
            },
            shape.hidden,
            shape.qkv_bias,
        )
        self._head_norm = self._read_head_norm(attention, reader) if shape.qk_norm else None
        self._output = reader.linear(
            {f"{attention}.o_proj": shape.hidden}, queries, shape.output_bias
        )
        self._mlp_norm = reader.vector(f"{prefix}.post_attention_layernorm.weight", shape.hidden)
        self._gate_up = reader.linear(
            {f"{mlp}.gate_proj": shape.intermediate, f"{mlp}.up_proj": shape.intermediate},
            shape.hidden,
            shape.mlp_bias,
        )
        self._down = reader.linear(
            {f"{mlp}.down_proj": shape.hidden}, shape.intermediate, shape.mlp_bias
        )

    def _read_head_norm(self, attention: str, reader: WeightReader) -> Tensor:
        """Norm weights of query and key heads, a row a head: [heads + kv_heads, head_dim]."""
        shape = self._shape
        query = reader.vector(f"{attention}.q_norm.weight", shape.head_dim)
        key = reader.vector(f"{attention}.k_norm.weight", shape.head_dim)
        return torch.cat([query.expand(shape.heads, -1), key.expand(shape.kv_heads, -1)])

    def __call__(
        self, x: Tensor, rotation: Rotation, batch: ForwardBatch, attention: PagedAttention
    ) -> Tensor:
        """x [tokens, hidden], the residual stream; changed in place and returned."""
        shape = self._shape
        normed = F.rms_norm(x, (shape.hidden,), self._input_norm, shape.epsilon)
        x += self._output(self._attend(self._qkv(normed), rotation, batch, attention))
        normed = F.rms_norm(x, (shape.hidden,), self._mlp_norm, shape.epsilon)
        gate, up = self._gate_up(normed).chunk(2, dim=-1)
        x += self._down(F.silu(gate).mul_(up))
        return x

    def _attend(
        self, qkv: Tensor, rotation: Rotation, batch: ForwardBatch, attention: PagedAttention
    ) -> Tensor:
        """qkv [tokens, (heads + 2 kv_heads) * head_dim]; rotated in place, so that K and V are one
        row for the pages.
        """
        shape = self._shape
        heads = qkv.view(len(qkv), shape.heads + 2 * shape.kv_heads, shape.head_dim)
        rotated = heads[:, : shape.heads + shape.kv_heads]
        if self._head_norm is not None:
            normed = F.rms_norm(rotated, (shape.head_dim,), None, shape.epsilon)
            torch.mul(normed, self._head_norm, out=rotated)
        rotate(rotated, rotation)
        query = heads[:, : shape.heads]
        kv = qkv[:, shape.heads * shape.head_dim :]
        mixed = attention.attend(self._index, query, kv, batch, self._options)
        return mixed.reshape(len(qkv), shape.heads * shape.head_dim)


class Decoder:
    """A `CausalModel` of this family."""

    def __init__(
        self,
        shape: DecoderShape,
        config: ModelConfig,
        source: WeightSource,
        precision: Precision,
        device: str,
    ) -> None:
        reader = WeightReader(source, precision, device)
        windows = shape.windows or (None,) * shape.layers
        self._shape = shape
        self._compute = precision.compute
        self._rotary = Rotary(config, shape.head_dim, precision.compute, device)
        self._table = reader.table("model.embed_tokens.weight", shape.vocabulary, shape.hidden)
        self._layers = [Layer(index, shape, reader, window) for index, window in enumerate(windows)]
        self._norm = reader.vector("model.norm.weight", shape.hidden)
        self._head = (
            reader.factory.make(self._table)
            if shape.tied
            else reader.linear({"lm_head": shape.vocabulary}, shape.hidden, bias=False)
        )
        self.geometry = KvGeometry(shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
        self.vocabulary = shape.vocabulary
        self.parameters = reader.factory.parameters - shape.tied * self._table.numel()
        self.weight_bytes = reader.factory.weight_bytes

    def hidden(self, batch: ForwardBatch, attention: PagedAttention) -> Tensor:
        """Final hidden states, ready for the head: [tokens, hidden]."""
        x = F.embedding(batch.token_ids, self._table).to(self._compute)
        rotation = self._rotary.at(batch.positions)
        for layer in self._layers:
            x = layer(x, rotation, batch, attention)
        return F.rms_norm(x, (self._shape.hidden,), self._norm, self._shape.epsilon)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: [rows, vocabulary] float32."""
        return self._head(hidden).float()
