"""The arithmetic against models that are really built, and steps that really run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backend.cache import PrefixCache
from backend.hf.attention import AttentionSetup
from backend.hf.attention.choice import ATTENTION
from backend.hf.attention.sdpa import SdpaAttention
from backend.hf.cuda_graphs import ladder
from backend.hf.executor import HEAD_ROWS, HfExecutor
from backend.hf.forecast import (
    GRAPHLESS,
    GRAPHS,
    ITEM_BYTES,
    MIB,
    PROMPT_SIZES,
    SCORED_ROWS,
    Formats,
    expect_peak,
    graph_reserve,
    kv_token_bytes,
    parameters,
    product_elements,
    weight_memory,
)
from backend.hf.loading.dummy import DummyWeights
from backend.hf.memory import measure_peak
from backend.hf.models import torch_blocks
from backend.hf.models.decoder import Decoder, DecoderShape, Placing
from backend.hf.models.linear import PlainLinear
from backend.hf.models.registry import decoder_shape
from backend.hf.models.torch_blocks import TorchBlocks
from backend.hf.precision import PRECISIONS
from backend.hf.prompt_graphs import MOST_TOKENS, STEPS
from backend.interface import BackendSpec
from config import BackendSettings, BatchSettings

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "dtype": "float32",
}
LLAMA, QWEN2, QWEN3 = (
    SIZES | {"architectures": [f"{family}ForCausalLM"]} for family in ("Llama", "Qwen2", "Qwen3")
)
CONFIGS = {
    "llama": LLAMA,
    "llama tied, biases": LLAMA
    | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": QWEN2,
    "qwen3 tied, wide heads": QWEN3 | {"tie_word_embeddings": True, "head_dim": 16},
}
CONTEXT = 256


class CountingWeights(DummyWeights):
    """Adds up what is read."""

    elements: int = 0

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = super().read(name, shape)
        self.elements += tensor.numel()
        return tensor


def build(name: str, dtype: str = "float32") -> tuple[DecoderShape, Decoder, int]:
    """The shape, the model on a CPU, and the elements that were read for it."""
    shape = decoder_shape(CONFIGS[name])
    assert shape is not None
    precision = PRECISIONS[dtype]
    blocks, placing = TorchBlocks(precision, "cpu"), Placing("cpu", precision, CONTEXT)
    weights = CountingWeights(CONFIGS[name])
    model = Decoder(shape, CONFIGS[name], weights, blocks, placing)
    return shape, model, weights.elements


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_the_bytes_of_weights_and_keys_are_those_of_the_model(
    name: str, dtype: str
) -> None:
    shape, model, _ = build(name, dtype)
    geometry = model.geometry
    assert parameters(shape) == model.parameters
    assert product_elements(shape) * ITEM_BYTES[dtype] == model.weight_bytes
    assert kv_token_bytes(shape, dtype) == geometry.layers * geometry.row * ITEM_BYTES[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_take_what_was_read_of_them(name: str) -> None:
    shape, _, read = build(name)
    # norms of heads are read once and kept for each head
    repeated = shape.qk_norm * (shape.heads + shape.kv_heads - 2) * shape.head_dim * shape.layers
    one = Formats("float32", "float32", "float32", packed=False)
    assert weight_memory(shape, one) == {"float32": 4 * (read + repeated)}


def test_a_tied_head_is_copied_where_it_cannot_share_the_table() -> None:
    shape = decoder_shape(CONFIGS["qwen3 tied, wide heads"])
    assert shape is not None
    shared = Formats("bfloat16", "bfloat16", "bfloat16", packed=False)
    table = 2 * shape.vocabulary * shape.hidden
    lone = weight_memory(shape, shared)["bfloat16"]
    assert weight_memory(shape, replace(shared, packed=True)) == {"bfloat16": lone + table}
    other = weight_memory(shape, replace(shared, table="float16"))
    assert other == {"bfloat16": lone, "float16": table}


def test_prompts_are_scored_in_the_slices_that_are_counted() -> None:
    assert SCORED_ROWS == HEAD_ROWS


class Tensors(TorchDispatchMode):
    """An `Allocator`: the storages that operations have made and that are still held."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ours: dict[int, tuple[StorageWeakRef, int]] = {}
        self._foreign: dict[int, StorageWeakRef] = {}
        self._high = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._ours or self._ours[reference.cdata][0].expired():
                self._foreign.setdefault(reference.cdata, reference)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            reference = StorageWeakRef(storage)
            foreign = self._foreign.get(reference.cdata)
            if foreign is None or foreign.expired():
                self._ours[reference.cdata] = reference, storage.nbytes()
        self._high = max(self._high, self.allocated())
        return result

    def restart(self) -> None:
        self._high = self.allocated()

    def allocated(self) -> int:
        self._ours = {key: held for key, held in self._ours.items() if not held[0].expired()}
        return sum(size for _, size in self._ours.values())

    def highest(self) -> int:
        return self._high


def _storages(values: Any) -> list[Any]:
    return [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_prompts_takes_what_is_expected_of_its_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # packed weights are opaque
    monkeypatch.setattr(torch_blocks, "linear_kind", lambda *_: PlainLinear)
    shape, model, _ = build(name)
    limits = BatchSettings(max_running=3, max_step_tokens=4096)
    spec = BackendSpec(
        "hf", "tiny", None, shape.vocabulary, CONTEXT, (), 16, CONTEXT // 16, limits.max_running,
        limits.max_step_tokens, 1, "cpu", "float32", "sdpa",
    )  # fmt: skip
    setup = AttentionSetup(model.geometry, 1, spec.page_tokens, torch.float32, "cpu")
    with Tensors() as tensors:
        measured = measure_peak(
            lambda: HfExecutor(spec, PrefixCache(1, 16, False), model, SdpaAttention(setup)),
            graphed=None,
            allocator=tensors,
        )
    settings = BackendSettings(batch=limits)
    expected = expect_peak(shape, settings, limits, CONTEXT, "float32")
    # torch's pieces keep the rotation of each token, ours a table that is loaded with the weights
    rotations = limits.max_running * CONTEXT * 2 * shape.head_dim * ITEM_BYTES["float32"]
    assert measured.prefill - rotations == pytest.approx(expected.prefill, rel=0.02)


def test_peaks_are_those_that_were_read_on_an_h200(root: Path) -> None:
    config = json.loads((root / "tests/shapes/qwen3-0.6b/config.json").read_text())
    shape = decoder_shape(config)
    assert shape is not None
    limits = BatchSettings(max_running=256, max_step_tokens=16384)
    peak = expect_peak(shape, BackendSettings(batch=limits), limits, 40960, "bfloat16")
    assert peak.prefill == pytest.approx(513 * MIB, rel=0.01)
    assert peak.decode == pytest.approx(413 * MIB, rel=0.01)
    assert peak.held == pytest.approx(222 * MIB, rel=0.03)


def test_prompt_graphs_have_the_sizes_that_are_counted() -> None:
    assert list(PROMPT_SIZES) == ladder(MOST_TOKENS, STEPS)


def test_no_graphs_are_counted_for_attention_that_none_can_hold() -> None:
    assert list(GRAPHLESS) == [name for name in ATTENTION if not ATTENTION[name].capturable]


@pytest.mark.parametrize("step_tokens", [1, 32, 33, 500, 4095, 4096, 4097, 16384])
def test_graphs_are_reserved_for_every_size_that_is_captured(step_tokens: int) -> None:
    shape = decoder_shape(LLAMA)
    assert shape is not None
    sizes = ladder(min(step_tokens, MOST_TOKENS), STEPS)
    heads = 2 * (6 + 2) * 8
    room = sizes[-1] * (2 * heads + 3 * 8)
    gates = sum(sizes) * 2 * 2 * 160
    assert graph_reserve(shape, step_tokens, "bfloat16", 7) == 7 + room + gates + GRAPHS
