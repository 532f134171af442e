"""Safetensors folders: whole, in shards, and broken as disks and downloads break them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backend.hf.loading.checkpoint import SafetensorsWeights
from backend.interface import ModelBroken

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.weight": torch.full((2, 2), 0.5, dtype=torch.float16),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    places = {name: f"model-{n:05}-of-00003.safetensors" for n, name in enumerate(TENSORS, 1)}
    for name, file in places.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_come_as_they_were_written(layout: str, request: pytest.FixtureRequest) -> None:
    with SafetensorsWeights(request.getfixturevalue(layout)) as weights:
        for name, tensor in TENSORS.items():
            found = weights.read(name, tuple(tensor.shape))
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_a_single_file_of_another_name_is_found(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    with SafetensorsWeights(single) as weights:
        assert torch.equal(weights.read("a.weight", (3, 4)), TENSORS["a.weight"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_nothing_stays_mapped_after_the_end_though_tensors_live_on(sharded: Path) -> None:
    with SafetensorsWeights(sharded) as weights:
        kept = [weights.read(name, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
        assert str(sharded) in Path("/proc/self/maps").read_text()
    assert str(sharded) not in Path("/proc/self/maps").read_text()
    assert torch.equal(kept[0], TENSORS["a.weight"])


def test_a_wrong_shape_names_file_tensor_and_both_shapes(single: Path) -> None:
    with (
        SafetensorsWeights(single) as weights,
        pytest.raises(
            ModelBroken, match=r"model\.safetensors: tensor a\.weight must be \[4, 3\], is \[3, 4\]"
        ),
    ):
        weights.read("a.weight", (4, 3))


def test_a_missing_tensor_is_named(single: Path) -> None:
    with (
        SafetensorsWeights(single) as weights,
        pytest.raises(ModelBroken, match=r"no tensor d\.weight \[7\]"),
    ):
        weights.read("d.weight", (7,))


def test_a_missing_shard_is_named_before_anything_is_read(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelBroken, match=r"model-00002-of-00003\.safetensors: it is missing"):
        SafetensorsWeights(sharded)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused_with_one_line_that_names_it(single: Path, part: float) -> None:
    file = single / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ModelBroken, match=r"model\.safetensors") as caught:
        SafetensorsWeights(single)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["<html>not found</html>", "version https://git-lfs", "\x00" * 99])
def test_another_thing_under_the_name_is_refused(single: Path, text: str) -> None:
    (single / "model.safetensors").write_text(text)
    with pytest.raises(ModelBroken, match=r"model\.safetensors"):
        SafetensorsWeights(single)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_broken_index_is_named(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelBroken, match=r"model\.safetensors\.index\.json"):
        SafetensorsWeights(sharded)


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelBroken, match=r"3 safetensors files and no model\.safetensors\.index"):
        SafetensorsWeights(sharded)
