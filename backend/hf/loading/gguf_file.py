"""A GGUF file opened: typed metadata and tensor entries, each failure one line that names the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read by the `gguf` package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from gguf import GGUFReader
from gguf.gguf_reader import ReaderTensor
from numpy.typing import DTypeLike, NDArray

from backend.interface import ModelBroken, Unsupported

T = TypeVar("T")


class BoundedReader(GGUFReader):
    """Refuses to read past the end, where its parent hands out short arrays: a garbled count would
    otherwise be counted to.
    """

    def _get(
        self,
        offset: int,
        dtype: DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> NDArray[Any]:
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,} and goes on to {end:,}")
        return super()._get(offset, dtype, count, override_order)


class GgufFile:
    """One GGUF. The file stays mapped as long as this object lives.

    Raises ModelBroken when the file is not a whole GGUF, Unsupported when it is one part of many.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = BoundedReader(path)
            self._values = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OverflowError, OSError, MemoryError) as error:
            reason = " ".join(str(error).split())  # numpy's messages span lines
            raise ModelBroken(f"{path} is no complete GGUF: {reason}; fetch it again") from error
        self.tensors: dict[str, ReaderTensor] = {each.name: each for each in reader.tensors}
        if self.get("split.count", int, 1) > 1:
            raise Unsupported(
                f"{path} is one of several parts: join them first (llama-gguf-split --merge)"
            )

    def has(self, key: str) -> bool:
        """Whether the metadata holds `key`."""
        return key in self._values

    def keys_under(self, prefix: str) -> set[str]:
        """The keys of the metadata that start with `prefix`."""
        return {key for key in self._values if key.startswith(prefix)}

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The metadata value of `key`.

        Raises ModelBroken when it is of another type, or missing and without a default.
        """
        value = self._values.get(key, default)
        if not isinstance(value, kind):
            there = "nothing" if value is None else repr(value)[:60]
            raise ModelBroken(f"{self.path}: metadata {key} must be {kind.__name__}, has {there}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A float32 of the metadata as the decimal number it was rounded from: 1e-05, not
        9.999999747378752e-06.
        """
        return float(str(np.float32(self.get(key, float, default))))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor, outermost dimension first (GGUF lists them the other way round).

        None when there is no such tensor.
        """
        entry = self.tensors.get(name)
        return None if entry is None else tuple(int(size) for size in reversed(entry.shape))
