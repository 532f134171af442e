"""Weights and config of a GGUF, against the model it was written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from backend.hf.loading.gguf_folder import write_folder
from backend.interface import ModelBroken, Unsupported

MODELS = [("llama", True), ("qwen2", True), ("qwen2", False), ("qwen3", False)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _convert(source: Path, **options: Any) -> Path:
    folder = source.with_suffix(".hf")
    folder.mkdir()
    write_folder(source, folder, **options)
    return folder


@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_every_tensor_comes_back_in_its_place_and_row_order(
    tiny: Callable[..., Any], tmp_path: Path, architecture: str, tied: bool
) -> None:
    model = tiny(architecture, tied)
    folder = _convert(model.write(tmp_path / "m.gguf"))
    found, wanted = load_file(folder / "model.safetensors"), model.weights()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name].float(), tensor), name


@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_transformers_loads_the_folder_and_computes_the_same_logits(
    tiny: Callable[..., Any], tmp_path: Path, architecture: str, tied: bool
) -> None:
    model = tiny(architecture, tied)
    folder = _convert(model.write(tmp_path / "m.gguf"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(loaded) is type(model.model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.model(ids).logits)


# The largest error a type may make, as a part of the row's largest value: half a step, but a whole
# one for Q4_0, whose steps reach further below zero than above.
STEPS = {"F16": 1e-3, "BF16": 0.0, "Q8_0": 0.5 / 127, "Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16}


@pytest.mark.parametrize("kind", STEPS)
def test_a_quantized_tensor_is_within_its_own_error_of_the_original(
    tiny: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    model = tiny("llama")
    found = load_file(_convert(model.write(tmp_path / "m.gguf", kind)) / "model.safetensors")
    for name, tensor in model.weights().items():
        bound = tensor.abs().amax(-1, keepdim=True) * (STEPS[kind] + (2**-8 if STEPS[kind] else 0))
        assert bool(((found[name].float() - tensor).abs() <= bound).all()), name


def test_shards_hold_every_tensor_once_and_none_exceeds_the_limit(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("llama")
    folder = _convert(model.write(tmp_path / "m.gguf"), shard_bytes=70_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 2
    assert {path.name for path in folder.glob("*.safetensors")} == shards.keys()
    for name, tensor in model.weights().items():
        assert torch.equal(shards[index["weight_map"][name]][name].float(), tensor)
    assert sum(len(shard) for shard in shards.values()) == len(model.weights())
    sizes = [sum(t.nbytes for t in shard.values()) for shard in shards.values()]
    assert max(sizes) <= 70_000
    assert index["metadata"]["total_size"] == sum(sizes)


def test_the_head_width_need_not_be_hidden_over_heads(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("llama", head_dim=32)
    widths = {f"{{arch}}.attention.{name}_length": 32 for name in ("key", "value")}
    folder = _convert(model.write(tmp_path / "m.gguf", integers=widths))
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[name].float(), each) for name, each in model.weights().items())
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == 32


def test_numbers_of_the_config_are_the_decimal_ones(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    config = json.loads(
        (_convert(tiny("qwen3").write(tmp_path / "m.gguf")) / "config.json").read_text()
    )
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 50000.0)


def test_end_tokens_are_those_named_and_the_control_tokens_known_to_end_a_turn(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    source = tiny("llama").write(tmp_path / "m.gguf", integers={"tokenizer.ggml.eot_token_id": 5})
    found = json.loads((_convert(source) / "generation_config.json").read_text())
    assert found["eos_token_id"] == [1, 5]
    assert found["bos_token_id"] == 0


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        (
            {"texts": {"{arch}.rope.scaling.type": "linear"}, "floats": {"factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {
                "texts": {"{arch}.rope.scaling.type": "yarn"},
                "floats": {"factor": 4.0, "yarn_beta_fast": 16.0},
                "integers": {"{arch}.rope.scaling.original_context_length": 32},
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 16.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ],
)
def test_rope_scaling_is_carried_over(
    tiny: Callable[..., Any], tmp_path: Path, metadata: dict[str, Any], scaling: dict[str, Any]
) -> None:
    floats = {f"{{arch}}.rope.scaling.{key}": value for key, value in metadata["floats"].items()}
    source = tiny("qwen2").write(tmp_path / "m.gguf", **{**metadata, "floats": floats})
    assert json.loads((_convert(source) / "config.json").read_text())["rope_scaling"] == scaling


def _llama3_factors(factor: float) -> np.ndarray[Any, Any]:
    """What transformers divides its frequencies by, for the tiny model's base and width."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {**LLAMA3, "factor": factor, "rope_theta": 50000.0}
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 50000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_become_llama3_scaling_again(
    tiny: Callable[..., Any], tmp_path: Path, factor: float
) -> None:
    factors = _llama3_factors(factor)
    source = tiny("llama").write(tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
    found = json.loads((_convert(source) / "config.json").read_text())["rope_scaling"]
    assert found == {**LLAMA3, "factor": pytest.approx(factor, rel=1e-6)}


def test_rope_factors_of_no_known_law_are_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    source = tiny("llama").write(tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
    with pytest.raises(Unsupported, match=r"rope_freqs\.weight"):
        _convert(source)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"integers": {"{arch}.expert_count": 8}}, r"llama\.expert_count is 8"),
        ({"integers": {"{arch}.rope.dimension_count": 8}}, "dimension_count is 8"),
        ({"integers": {"{arch}.attention.sliding_window": 32}}, "sliding_window is 32"),
        ({"texts": {"{arch}.rope.scaling.type": "longrope"}}, "longrope"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, r"blk\.0\.attn_q\.bias"),
        ({"tensors": {"output.weight": np.zeros((267, 64), np.int8)}}, r"output\.weight is I8"),
        ({"integers": {"split.count": 3}}, "several parts|one of"),
        ({"pre": "klingon"}, "klingon"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(
    tiny: Callable[..., Any], tmp_path: Path, metadata: dict[str, Any], named: str
) -> None:
    source = tiny("llama").write(tmp_path / "m.gguf", **metadata)
    with pytest.raises(Unsupported, match=named):
        _convert(source)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        Unsupported, match="architecture 'mamba': from GGUF only llama, qwen2, qwen3"
    ):
        _convert(tmp_path / "m.gguf")


def test_a_missing_tensor_is_named(tiny: Callable[..., Any], tmp_path: Path) -> None:
    source = tiny("llama").write(tmp_path / "m.gguf", layers=3)
    with pytest.raises(ModelBroken, match=r"blk\.2\.attn_norm\.weight must be \[64\], has nothing"):
        _convert(source)
