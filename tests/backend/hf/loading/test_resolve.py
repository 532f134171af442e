"""From settings to a folder: what wins, what is refused, and how fast."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backend.hf.loading import hub as module
from backend.hf.loading.resolve import resolve
from backend.interface import ModelBroken, ModelNotFound, StartFailed, Unsupported
from config import ModelSettings

CONFIG = {"model_type": "llama", "eos_token_id": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and one tensor."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.ones(2, 2)}, place / "model.safetensors")
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and conversion cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def _local(place: Path, load_format: str = "auto") -> ModelSettings:
    return ModelSettings(local_dir=str(place), load_format=load_format)


def _refusal(settings: ModelSettings, kind: type[StartFailed]) -> str:
    with pytest.raises(kind) as caught:
        resolve(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_local_folder_wins_over_a_name(folder: Path) -> None:
    files = resolve(ModelSettings(local_dir=str(folder), name="some/other"))
    assert (files.folder, files.config, files.generation) == (folder, CONFIG, {})
    with files.open_weights() as weights:
        assert torch.equal(weights.read("a", (2, 2)), torch.ones(2, 2))


def test_a_name_that_is_a_path_is_that_path(folder: Path) -> None:
    assert resolve(ModelSettings(name=str(folder))).folder == folder


def test_end_tokens_are_the_generation_configs_before_the_configs(folder: Path) -> None:
    assert resolve(_local(folder)).end_ids == (3,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert resolve(_local(folder)).end_ids == (5, 6)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert resolve(_local(folder)).end_ids == (3,)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert resolve(_local(folder)).end_ids == (0,)


@pytest.mark.parametrize("wrong", ['"</s>"', "true", "[3, 1.5]", "{}"])
def test_end_tokens_that_are_no_ids_are_named(folder: Path, wrong: str) -> None:
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
    with pytest.raises(ModelBroken, match=r"^generation_config\.json: eos_token_id must be"):
        assert resolve(_local(folder)).end_ids


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "gguf"])
def test_one_safetensors_file_is_sent_to_its_folder(folder: Path, load_format: str) -> None:
    message = _refusal(_local(folder / "model.safetensors", load_format), ModelNotFound)
    assert message.endswith(f"name its folder, MODEL_LOCAL_DIR={folder}")


@pytest.mark.parametrize("name", ["config.json", "m.gguf"])
def test_a_file_that_is_no_gguf_leaves_nothing_in_the_cache(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (folder / name).write_text("{}")
    message = _refusal(_local(folder / name), ModelBroken)
    assert message.startswith(f"{folder / name} is no GGUF")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("load_format", ["auto", "gguf"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_gguf_becomes_a_folder_with_a_tokenizer(
    tiny: Callable[..., Any], tmp_path: Path, load_format: str, inside: bool
) -> None:
    (tmp_path / "d").mkdir()
    source = tiny("qwen2").write(tmp_path / "d" / "m.gguf")
    files = resolve(_local(source.parent if inside else source, load_format))
    assert (files.folder / "tokenizer.json").is_file()
    assert files.config["model_type"] == "qwen2"
    assert files.end_ids == (1,)
    assert tmp_path / "cache" in files.folder.parents
    with files.open_weights() as weights:
        assert weights.read("model.norm.weight", (64,)).dtype == torch.bfloat16


def test_a_folder_with_both_gives_safetensors_unless_gguf_is_asked_for(
    tiny: Callable[..., Any], folder: Path
) -> None:
    tiny("llama").write(folder / "m.gguf")
    assert resolve(_local(folder)).folder == folder
    assert resolve(_local(folder, "safetensors")).folder == folder
    assert resolve(_local(folder, "gguf")).folder != folder


def test_dummy_weights_need_a_config_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with resolve(_local(folder, "dummy")).open_weights() as weights:
        assert weights.read("x.weight", (3, 4)).shape == (3, 4)


def test_a_format_asked_for_by_name_is_never_replaced(
    tiny: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    source = tiny("llama").write(tmp_path / "d" / "m.gguf")
    assert "no .gguf file" in _refusal(_local(folder, "gguf"), ModelNotFound)
    assert "safetensors" in _refusal(_local(source.parent, "safetensors"), ModelNotFound)
    assert "config.json" in _refusal(_local(source.parent, "dummy"), ModelNotFound)
    hub = ModelSettings(name="some/name/m.gguf", load_format="safetensors")
    assert "some/name/m.gguf" in _refusal(hub, Unsupported)


def test_several_ggufs_in_a_folder_are_not_chosen_from(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("")
    assert "2 .gguf files" in _refusal(_local(tmp_path), ModelNotFound)


def test_a_folder_that_does_not_exist_is_named_with_what_to_do(tmp_path: Path) -> None:
    message = _refusal(_local(tmp_path / "nowhere"), ModelNotFound)
    assert f"MODEL_LOCAL_DIR={tmp_path / 'nowhere'}" in message
    assert "make model" in message


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in _refusal(_local(folder), ModelBroken)


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert str(folder / "config.json") in _refusal(_local(folder), ModelBroken)


def test_a_quantized_checkpoint_is_refused_instead_of_misread(folder: Path) -> None:
    quantized = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(quantized))
    assert "quantized (fp8)" in _refusal(_local(folder), Unsupported)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": "fp8"}))
    message = _refusal(_local(folder), ModelBroken)
    assert message.startswith("config.json: quantization_config must be dict")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": None}))
    assert resolve(_local(folder)).folder == folder


@pytest.mark.parametrize(
    "name", ["mini-sglang-tests/no-such-model", "./no/such/folder", "no such name"]
)
def test_an_unknown_name_is_one_line_within_seconds(name: str) -> None:
    start = time.monotonic()
    message = _refusal(ModelSettings(name=name), ModelNotFound)
    assert time.monotonic() - start < 8
    assert name in message
    assert "MODEL_LOCAL_DIR" in message
    assert "make model" in message


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr(module, "HUB_TIMEOUT_S", 0.2)
        start = time.monotonic()
        _refusal(ModelSettings(name="some/name"), ModelNotFound)
        assert time.monotonic() - start < 5


def _cached(cache: Path, folder: Path) -> Path:
    """`folder` as the hub's client keeps it after a download."""
    repository = cache / "models--some--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_model_in_the_hubs_cache_needs_no_network(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = _cached(cache, folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert resolve(ModelSettings(name="some/name")).folder == snapshot


def test_a_cached_config_without_weights_serves_dummy_weights_only(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").unlink()
    snapshot = _cached(cache, folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert resolve(ModelSettings(name="some/name", load_format="dummy")).folder == snapshot
    assert "some/name" in _refusal(ModelSettings(name="some/name"), ModelNotFound)
