"""Made-up weights: the same everywhere, of the statistics a fresh model has."""

from __future__ import annotations

import pytest
import torch

from backend.hf.loading.dummy import BLOCK, DummyWeights
from backend.interface import Unsupported

NAME, SHAPE = "model.layers.0.mlp.up_proj.weight", (96, 64)
PINNED = [-0.02204566, -0.00123709, -0.01675555]


def test_a_tensor_depends_on_its_name_alone_not_on_the_order_of_reading() -> None:
    first, second = DummyWeights({}), DummyWeights({})
    second.read("another.weight", (64, 64))
    torch.manual_seed(5)
    assert torch.equal(first.read(NAME, SHAPE), second.read(NAME, SHAPE))
    assert not torch.equal(first.read(NAME, SHAPE), first.read(NAME.replace("0", "1"), SHAPE))


def test_a_tensor_is_the_same_in_every_process() -> None:
    # written down once: a process with another hash seed or library order must make the same
    found = DummyWeights({"dtype": "float32"}).read(NAME, (4, 4)).flatten()[:3]
    assert found.tolist() == pytest.approx(PINNED, abs=1e-7)


def test_norms_are_ones_and_biases_zeros() -> None:
    weights = DummyWeights({})
    assert torch.equal(weights.read("model.norm.weight", (64,)).float(), torch.ones(64))
    assert torch.equal(weights.read("self_attn.q_proj.bias", (64,)).float(), torch.zeros(64))


@pytest.mark.parametrize(("config", "deviation"), [({}, 0.02), ({"initializer_range": 0.1}, 0.1)])
def test_the_rest_is_normal_with_the_deviation_of_the_config(
    config: dict[str, float], deviation: float
) -> None:
    tensor = DummyWeights(config).read(NAME, (512, 512)).float()
    assert tensor.std().item() == pytest.approx(deviation, rel=0.02)
    assert tensor.mean().item() == pytest.approx(0, abs=deviation / 50)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
    ],
)
def test_the_dtype_is_the_configs(config: dict[str, str], dtype: torch.dtype) -> None:
    assert DummyWeights(config).read(NAME, SHAPE).dtype == dtype


def test_an_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="int3"):
        DummyWeights({"dtype": "int3"})


def test_a_large_tensor_is_random_throughout_not_one_block_repeated() -> None:
    tensor = DummyWeights({}).read(NAME, (3, BLOCK)).float()
    assert not torch.equal(tensor[0], tensor[1])
    assert tensor[2].std().item() == pytest.approx(0.02, rel=0.02)
