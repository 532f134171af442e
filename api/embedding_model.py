"""What a model's folder says of it as a maker of embeddings.

Pooling from the files of sentence-transformers (`modules.json`, the config of its Pooling module);
whether vectors may be cut from config.json, by the names that vLLM reads too. For `/v1/embeddings`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from api.errors import refused
from backend.interface import Pooling

POOLINGS: Mapping[str, Pooling] = {  # the modes that causal models are pooled by
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
MODULES = {"Transformer", "Pooling", "Normalize"}  # that we stand in for
REMEDY = 'give "pooling": "mean" or "last" if it is to be used so'


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """How prompts become vectors."""

    pooling: Pooling | None
    lack: str = ""  # with pooling None: why
    shortens: bool = False  # trained so that the first dimensions stand for all (Matryoshka)
    dimensions: tuple[int, ...] = ()  # with `shortens`: to one of these; empty: any

    def choose(self, asked: Pooling | None) -> Pooling:
        """What a request is pooled by. Raises ApiError where nothing says it."""
        if asked is None and self.pooling is None:
            raise refused(
                f"pooling is not defined for this model: {self.lack}; {REMEDY}", "pooling"
            )
        found = asked or self.pooling
        assert found is not None
        return found

    def check_dimensions(self, asked: int | None, width: int) -> None:
        """Raise ApiError for a length that vectors of `width` cannot have."""
        if asked is None or asked == width:
            return
        if asked > width:
            raise refused(f"dimensions {asked} exceed the {width} of this model", "dimensions")
        if not self.shortens:
            raise refused(
                f"dimensions must be {width}: this model's vectors may not be cut (its config.json "
                "has neither is_matryoshka nor matryoshka_dimensions)",
                "dimensions",
            )
        if self.dimensions and asked not in self.dimensions:
            allowed = ", ".join(map(str, self.dimensions))
            raise refused(f"dimensions must be one of {allowed} for this model", "dimensions")


@lru_cache(maxsize=4)
def embedding_model(folder: str | None) -> EmbeddingModel:
    """That of a model folder, read once; a file that is no JSON says nothing."""
    root = Path(folder or "")
    config = _read(root / "config.json") if folder else None
    pooling, lack = _pooling(root) if folder else (None, "there is no model folder")
    config = config if isinstance(config, dict) else {}
    dimensions = config.get("matryoshka_dimensions")
    sizes = tuple(each for each in dimensions or () if isinstance(each, int))
    shortens = bool(sizes) or config.get("is_matryoshka") is True
    return EmbeddingModel(pooling, lack, shortens, sizes)


def _pooling(root: Path) -> tuple[Pooling | None, str]:
    """The pooling, or why there is none."""
    modules = _read(root / "modules.json")
    if not isinstance(modules, list):
        return None, "its folder has no modules.json of sentence-transformers"
    kinds = {_kind(each): each for each in modules if isinstance(each, dict)}
    others = sorted(kinds.keys() - MODULES)
    if others:
        return None, f"its modules.json wants {others[0]}, which is not served"
    path = kinds.get("Pooling", {}).get("path", "1_Pooling")
    config = _read(root / str(path) / "config.json")
    modes = (
        [name for name, value in config.items() if value is True and "mode" in name]
        if (isinstance(config, dict))
        else []
    )
    if len(modes) == 1 and modes[0] in POOLINGS:
        return POOLINGS[modes[0]], ""
    return None, f"{path}/config.json asks for {' and '.join(modes) or 'nothing'}"


def _kind(module: Mapping[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def _read(path: Path) -> Any:
    """None: it is not there, or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
