"""A model described by its headers: the same as it is once it is loaded, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backend.hf.loading.outline import outline
from backend.hf.loading.resolve import resolve
from backend.interface import ModelNotFound, Unsupported
from config import ModelSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and weights of two dtypes."""
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    tensors = {
        "model.embed_tokens.weight": torch.ones(5, 4, dtype=torch.float16),
        "one": torch.ones(3, dtype=torch.float32),
        "two": torch.ones(2, 2, dtype=torch.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_headers_say_the_bytes_of_each_dtype_and_how_the_table_is_stored(folder: Path) -> None:
    found = outline(ModelSettings(local_dir=str(folder)))
    assert (found.stored, found.table) == ({"float16": 40, "float32": 28}, "float16")
    made_up = outline(ModelSettings(local_dir=str(folder), load_format="dummy"))
    assert (made_up.stored, made_up.table) == ({}, "bfloat16")


def test_a_dtype_that_does_not_run_is_refused_by_the_tensors_name(folder: Path) -> None:
    save_file({"odd": torch.ones(3, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(Unsupported, match="tensor odd is I8"):
        outline(ModelSettings(local_dir=str(folder)))


def test_a_quantized_model_is_refused_as_a_start_would(folder: Path) -> None:
    config = {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="is quantized \\(awq\\)"):
        outline(ModelSettings(local_dir=str(folder)))


def test_a_gguf_is_described_without_being_converted(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    settings = ModelSettings(local_dir=str(tiny("qwen3").write(tmp_path / "tiny.gguf", "F16")))
    found = outline(settings)
    assert not cache.exists()
    assert found.config == resolve(settings).config
    assert found.table == "bfloat16"
    assert set(found.stored) == {"F16", "F32"}


def test_a_gguf_of_the_hub_is_asked_for_as_a_file() -> None:
    with pytest.raises(ModelNotFound, match="MODEL_LOCAL_DIR"):
        outline(ModelSettings(name="some/model/file.gguf"))
