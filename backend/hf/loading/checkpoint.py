"""Weights from safetensors files, memory-mapped while they are open."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from backend.hf.loading.folder import weight_files
from backend.interface import ModelBroken


class SafetensorsWeights:
    """The tensors of a Hugging Face folder: a WeightSource and a context manager.

    Opening checks every file's header and length. Raises ModelBroken naming the file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, tuple[Path, Any]] = {}  # tensor name -> file and its open handle
        with ExitStack() as opened:
            for file in weight_files(folder):
                handle = opened.enter_context(_open(file))
                self._places |= dict.fromkeys(handle.keys(), (file, handle))
            self._opened = opened.pop_all()

    def __enter__(self) -> SafetensorsWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files. Nothing can be read after it."""
        self._places.clear()
        self._opened.close()

    def headers(self) -> dict[str, tuple[str, int]]:
        """Every tensor's dtype, as safetensors calls it, and elements. Reads no weights."""
        slices = {name: handle.get_slice(name) for name, (_, handle) in self._places.items()}
        return {
            name: (each.get_dtype(), math.prod(each.get_shape())) for name, each in slices.items()
        }

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, on the CPU, in the checkpoint's dtype.

        A copy: a view would keep the whole mapping alive, with every page that was ever touched.
        Raises ModelBroken naming file and tensor when missing or of another shape.
        """
        if name not in self._places:
            raise ModelBroken(f"{self._folder} holds no tensor {name} {list(shape)}")
        file, handle = self._places[name]
        there = tuple(handle.get_slice(name).get_shape())
        if there != shape:
            raise ModelBroken(f"{file}: tensor {name} must be {list(shape)}, is {list(there)}")
        tensor: Tensor = handle.get_tensor(name)
        return tensor.clone()


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        reason = "it is missing" if not file.exists() else " ".join(str(error).split())
        raise ModelBroken(
            f"cannot read weights from {file}: {reason}; fetch the model again"
        ) from error
