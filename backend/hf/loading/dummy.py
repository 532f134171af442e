"""Made-up weights for a model of which only the config.json is there: LOAD_FORMAT=dummy."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from backend.hf.models import ModelConfig, config_value
from backend.interface import Unsupported

BLOCK = 1 << 18  # elements of one generator: a layer's tensors are drawn on every core

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_name(config: ModelConfig) -> str:
    """The dtype that a config.json gives its weights. Raises Unsupported for others than ours."""
    older = config_value(config, "torch_dtype", str, "bfloat16")  # before transformers 5
    name = config_value(config, "dtype", str, older)
    if name not in DTYPES:
        raise Unsupported(f"config.json has dtype {name}: weights are {', '.join(DTYPES)} here")
    return name


class DummyWeights:
    """A WeightSource that holds every name: norms are ones, biases zeros, the rest is normal.

    A tensor depends on its name, shape and the config's dtype and `initializer_range` alone, so
    every process and every run makes the same model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._dtype = DTYPES[dtype_name(config)]
        self._deviation = config_value(config, "initializer_range", float, 0.02)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())

    def __enter__(self) -> DummyWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, on the CPU, in the config's dtype."""
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self._dtype)
        if len(shape) == 1:  # in a decoder only norms have weights of one dimension
            return torch.ones(shape, dtype=self._dtype)
        tensor = torch.empty(shape, dtype=self._dtype)
        flat = tensor.view(-1)

        def fill(start: int) -> None:
            digest = hashlib.blake2b(f"{name} {start}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            block = flat[start : start + BLOCK]
            # float32, of which torch draws vectors at once, in every version
            drawn = torch.empty(len(block)).normal_(0.0, self._deviation, generator=generator)
            block.copy_(drawn)

        list(self._pool.map(fill, range(0, flat.numel(), BLOCK)))
        return tensor
