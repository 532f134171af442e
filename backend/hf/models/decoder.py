"""The decoder that Llama and its relatives share: pre-norm, rotary attention with grouped queries,
gated SiLU feed-forward.

A family's own file turns its config.json into a `DecoderShape`; nothing here knows a family's name.
Weights are read under the names that Hugging Face checkpoints of all these families use. Query, key
and value are one product, and so are gate and up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.hf.attention import AttentionOptions, KvGeometry, PagedAttention
from backend.hf.batch import ForwardBatch
from backend.hf.models import ModelConfig, WeightSource, config_value, positive
from backend.hf.models.blocks import Blocks, HeadLayout, Norm, Rotation
from backend.hf.models.rope import read_rotary
from backend.hf.precision import Precision
from backend.interface import ModelBroken, Unsupported

Pools: TypeAlias = Sequence[Tensor]  # of attention: one a layer


@dataclass(frozen=True, slots=True)
class Placing:
    """Where a model is held, in which formats, and for how many positions."""

    device: str
    precision: Precision
    context: int


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

    @property
    def geometry(self) -> KvGeometry:
        """Of its KV cache."""
        return KvGeometry(self.layers, self.kv_heads, self.head_dim, self.head_dim)


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
    """Reads a checkpoint's weights by name; what takes several at once is stacked."""

    def __init__(self, source: WeightSource, epsilon: float) -> None:
        self._source = source
        self._epsilon = epsilon

    def norm(self, name: str, width: int) -> Norm:
        return Norm(self._source.read(f"{name}.weight", (width,)), self._epsilon)

    def table(self, name: str, rows: int, width: int) -> Tensor:
        return self._source.read(f"{name}.weight", (rows, width))

    def product(
        self, names: dict[str, int], width: int, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Weight [rows, width] and bias [rows] of several products stacked: `names` maps a module's
        name to its rows.
        """
        read = self._source.read
        weights = [read(f"{name}.weight", (rows, width)) for name, rows in names.items()]
        biases = [read(f"{name}.bias", (rows,)) for name, rows in names.items() if bias]
        return torch.cat(weights), torch.cat(biases) if biases else None


@dataclass(frozen=True, eq=False, slots=True)
class Room:
    """What layers leave to attention and back, the same memory for all of them."""

    qkv: Tensor  # [tokens, (heads + 2 kv_heads) * head_dim]: query, key and value heads
    mixed: Tensor  # [tokens, heads * head_dim]

    def first(self, tokens: int) -> Room:
        """The part for so many tokens."""
        return Room(self.qkv[:tokens], self.mixed[:tokens])


@dataclass(frozen=True, eq=False, slots=True)
class Flow:
    """A step on its way through the layers."""

    x: Tensor  # [tokens, hidden]: the residual stream
    rotation: Rotation
    write_at: Tensor  # [tokens] int64
    qkv: Tensor  # of the layer that attends next: see `Room`
    mixed: Tensor  # of the layer that attended last


class Layer:
    """One block: attention, then feed-forward, each added to the residual stream."""

    def __init__(
        self,
        index: int,
        shape: DecoderShape,
        reader: WeightReader,
        blocks: Blocks,
        window: int | None,
    ) -> None:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._index = index
        self._heads = shape.heads, shape.head_dim
        self._options = AttentionOptions(scale=shape.head_dim**-0.5, window=window)
        self._qkv = blocks.normed_product(
            reader.norm(f"{prefix}.input_layernorm", shape.hidden),
            *reader.product(
                {
                    f"{attention}.q_proj": queries,
                    f"{attention}.k_proj": keys,
                    f"{attention}.v_proj": keys,
                },
                shape.hidden,
                shape.qkv_bias,
            ),
        )
        self._turn = blocks.turn_heads(_head_layout(shape, reader, attention))
        self._output = blocks.added_product(
            *reader.product({f"{attention}.o_proj": shape.hidden}, queries, shape.output_bias)
        )
        self._gate_up = blocks.gated_product(
            reader.norm(f"{prefix}.post_attention_layernorm", shape.hidden),
            *reader.product(
                {f"{mlp}.gate_proj": shape.intermediate, f"{mlp}.up_proj": shape.intermediate},
                shape.hidden,
                shape.mlp_bias,
            ),
        )
        self._down = blocks.added_product(
            *reader.product({f"{mlp}.down_proj": shape.hidden}, shape.intermediate, shape.mlp_bias)
        )

    def before(self, flow: Flow, pools: Pools) -> None:
        """What attention reads: `flow.qkv` from `flow.x`, turned; K and V are in the pool."""
        self._qkv(flow.x, flow.qkv)
        self._turn(flow.qkv, flow.rotation, pools[self._index], flow.write_at)

    def attend(self, flow: Flow, batch: ForwardBatch, attention: PagedAttention) -> None:
        """`flow.mixed` from `flow.qkv`, for the tokens of `batch`."""
        heads, width = self._heads
        tokens = len(batch.token_ids)
        qkv, mixed = flow.qkv[:tokens], flow.mixed[:tokens]
        query = qkv[:, : heads * width].view(tokens, heads, width)
        output = mixed.view(tokens, heads, width)
        kv = qkv[:, heads * width :]
        attention.attend(self._index, query, kv, batch, self._options, output)

    def after(self, flow: Flow) -> None:
        """Add attention and feed-forward to `flow.x`."""
        self._output(flow.mixed, flow.x)
        self._down(self._gate_up(flow.x), flow.x)


def _head_layout(shape: DecoderShape, reader: WeightReader, attention: str) -> HeadLayout:
    """The heads of the layer whose attention's weights have this prefix."""
    norms = {}
    if shape.qk_norm:
        norms = {
            "query_norm": reader.norm(f"{attention}.q_norm", shape.head_dim),
            "key_norm": reader.norm(f"{attention}.k_norm", shape.head_dim),
        }
    return HeadLayout(shape.heads, shape.kv_heads, shape.head_dim, **norms)


class Decoder:
    """A `CausalModel` of this family."""

    def __init__(
        self,
        shape: DecoderShape,
        config: ModelConfig,
        source: WeightSource,
        blocks: Blocks,
        placing: Placing,
    ) -> None:
        reader = WeightReader(source, shape.epsilon)
        windows = shape.windows or (None,) * shape.layers
        self.shape = shape
        self._compute = placing.precision.compute
        self._table = self._place_table(reader, shape, placing)
        rotary = read_rotary(config, shape.head_dim)
        self._turn_positions = blocks.turn_positions(rotary, placing.context)
        self._layers = [
            Layer(index, shape, reader, blocks, window) for index, window in enumerate(windows)
        ]
        self._norm = blocks.norm(reader.norm("model.norm", shape.hidden))
        self._head = blocks.head(
            self._table if shape.tied else reader.table("lm_head", shape.vocabulary, shape.hidden)
        )
        self.geometry = shape.geometry
        self.layers = shape.layers
        self.vocabulary = shape.vocabulary
        self.parameters = blocks.parameters + (not shape.tied) * self._table.numel()
        self.weight_bytes = blocks.weight_bytes

    def _place_table(self, reader: WeightReader, shape: DecoderShape, placing: Placing) -> Tensor:
        """The embedding table, kept in 16 bits where the weights are: rows are widened as they are
        read.
        """
        table = reader.table("model.embed_tokens", shape.vocabulary, shape.hidden)
        wide = placing.precision.weights == torch.float32
        return table.to(placing.device, torch.float32 if wide else table.dtype)

    def hidden(self, batch: ForwardBatch, attention: PagedAttention) -> Tensor:
        """Final hidden states, ready for the head: [tokens, hidden]."""
        pools = attention.pools
        room = self.room(len(batch.token_ids))
        flow = self.enter(batch.token_ids, batch.positions, batch.write_at, pools, room)
        for layer in range(self.layers - 1):
            self.attend(layer, flow, batch, attention)
            self.advance(layer, flow, pools)
        self.attend(self.layers - 1, flow, batch, attention)
        return self.leave(flow)

    # The parts of it, between which attention stands: `hidden` runs them one after the other,
    # `PromptGraphs` from graphs.

    def room(self, tokens: int) -> Room:
        """For so many tokens; not written."""
        shape = self.shape
        width, table = shape.heads * shape.head_dim, self._table
        rows = width + 2 * shape.kv_heads * shape.head_dim
        return Room(
            table.new_empty(tokens, rows, dtype=self._compute),
            table.new_empty(tokens, width, dtype=self._compute),
        )

    def enter(
        self, token_ids: Tensor, positions: Tensor, write_at: Tensor, pools: Pools, room: Room
    ) -> Flow:
        """As far as the first attention; all [tokens] int64."""
        x = F.embedding(token_ids, self._table).to(self._compute)
        flow = Flow(x, self._turn_positions(positions), write_at, room.qkv, room.mixed)
        self._layers[0].before(flow, pools)
        return flow

    def attend(
        self, layer: int, flow: Flow, batch: ForwardBatch, attention: PagedAttention
    ) -> None:
        """The attention of a layer, for the tokens of `batch`, which may be fewer than flow."""
        self._layers[layer].attend(flow, batch, attention)

    def advance(self, layer: int, flow: Flow, pools: Pools) -> None:
        """From the attention of a layer to the next."""
        self._layers[layer].after(flow)
        self._layers[layer + 1].before(flow, pools)

    def leave(self, flow: Flow) -> Tensor:
        """From the last attention to the final hidden states [tokens, hidden]."""
        self._layers[-1].after(flow)
        return self._norm(flow.x)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Scores over the vocabulary: [rows, vocabulary] float32, in `out` where given."""
        return self._head(hidden, out)
